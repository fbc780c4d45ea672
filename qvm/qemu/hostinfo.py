"""What an accelerator needs of the host, asked through functions that a test can replace by recorded answers."""

from __future__ import annotations

import grp
import os
import platform
import pwd
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qvm.errors import QvmError
from qvm.process import run

KVM_DEVICE = Path("/dev/kvm")


@dataclass(frozen=True, slots=True)
class KvmDevice:
    """/dev/kvm as this user finds it. `error`: what opening it failed with (an errno's text), None if it opens."""

    exists: bool
    error: str | None = None
    denied: bool = False
    group: str = ""
    """The group it belongs to; empty when that group may not use it."""
    listed: bool = False
    """Whether the user is in that group by now, so that a new login is all it takes."""


@dataclass(frozen=True, slots=True)
class Host:
    system: str
    """`platform.system()`"""
    machine: str
    """`platform.machine()`"""
    boot_id: Callable[[], str]
    kvm_device: Callable[[], KvmDevice]
    sysctl: Callable[[str], str | None]
    """A macOS sysctl's value, None where there is none of that name."""


def this_host() -> Host:
    return Host(platform.system(), platform.machine(), read_boot_id, look_at_kvm, read_sysctl)


def read_boot_id() -> str:
    """What differs from one boot of this host to the next; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return read_sysctl("kern.bootsessionuuid") or ""


def read_cpu_model() -> str:
    """What decides which instructions a guest under KVM or HVF sees; empty where the system does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return read_sysctl("machdep.cpu.brand_string") or ""
    first = text.split("\n\n", 1)[0]
    told = ("vendor_id", "model name", "cpu family", "model", "stepping", "microcode", "flags", "CPU part", "Features")
    return "\n".join(line for line in first.splitlines() if line.split("\t")[0].strip(": ") in told)


def read_sysctl(name: str) -> str | None:
    try:
        return run(["sysctl", "-n", name], timeout=5).text.strip() or None
    except QvmError:
        return None


def look_at_kvm() -> KvmDevice:
    try:
        os.close(os.open(KVM_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return KvmDevice(exists=False)
    except PermissionError as error:
        return _denied(error)
    except OSError as error:
        return KvmDevice(exists=True, error=error.strerror)
    return KvmDevice(exists=True)


def _denied(error: PermissionError) -> KvmDevice:
    info = KVM_DEVICE.stat()
    usable = stat.S_IRGRP | stat.S_IWGRP
    if info.st_mode & usable != usable:
        return KvmDevice(exists=True, error=error.strerror, denied=True)
    try:
        group = grp.getgrgid(info.st_gid)
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return KvmDevice(exists=True, error=error.strerror, denied=True, group=str(info.st_gid))
    return KvmDevice(exists=True, error=error.strerror, denied=True, group=group.gr_name,
                     listed=user in group.gr_mem)

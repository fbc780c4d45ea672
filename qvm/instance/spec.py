"""InstanceSpec: one VM, completely decided; what the QEMU layer, the seed and the supervisor read.

Pure data: building a command line from it asks nothing of the host. Everything that could be chosen
(architecture, accelerator, ports, identifiers) has been chosen before one is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qvm.config.model import Mount


@dataclass(frozen=True, slots=True)
class Disk:
    """A virtio-blk disk. `format` is always explicit: QEMU must never guess it."""

    path: Path
    id: str
    """Also the disk's serial: the guest finds it as /dev/disk/by-id/virtio-<id>."""
    format: str = "qcow2"
    readonly: bool = False


@dataclass(frozen=True, slots=True)
class KernelBoot:
    """Direct kernel boot of an image that qvm built."""

    kernel: Path
    initrd: Path
    cmdline: str


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    name: str
    uuid: str
    arch: str
    accel: str
    """kvm, hvf or tcg: decided and proven."""
    cpus: int
    memory: int
    """Bytes."""
    disks: tuple[Disk, ...]
    """Root first, then data; the seed ISO last, read-only and raw."""
    mounts: tuple[Mount, ...]
    """Mount number i has the 9p tag `qvm<i>`."""
    mac: str
    ssh_port: int
    monitor_socket: Path
    agent_socket: Path
    stream_socket: Path
    serial_log: Path
    boot: KernelBoot | None
    """None: the firmware boots the root disk (UEFI)."""
    firmware_vars: Path | None = None
    ram_file: Path | None = None
    """RAM as a shared file (what a warm image needs); None: anonymous memory."""

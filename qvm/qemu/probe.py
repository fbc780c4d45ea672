"""Find QEMU on this host and ask it, once per build, what it can do.

The binary is run a single time without a machine and asked over QMP. Only named types are looked up: listing all of
them (`-device help`, qom-list-types) makes QEMU load every module it finds, which takes longer and aborts where an
upgrade left modules of another build behind.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from qvm.arch import Arch, find_arch
from qvm.errors import HostError, QemuError, QemuMissingError, QemuTooOldError, QvmError
from qvm.log import get_logger
from qvm.process import converse
from qvm.qemu.bus import virtio
from qvm.qemu.cache import file_identity, load_entry, save_entry
from qvm.qemu.features import QemuFeatures
from qvm.qemu.firmware import find_firmware
from qvm.qemu.packages import qemu_hint
from qvm.qemu.wire import CommandRefusedError, Wire
from qvm.wait import Deadline

log = get_logger(__name__)

OLDEST = (7, 0)
FORMAT = 1
"""Of the remembered answers; a new number forgets the old ones."""
PROBE_TIMEOUT = 10.0
"""Seconds. It takes 0.1; macOS verifies a new binary's signature before it first runs."""

ACCELS = ("kvm", "hvf", "tcg")
_OPTIONAL = ("pc-dimm", "virtio-mem-pci", "pvpanic-pci")
PROPERTIES = {"pcie-root-port": ("io-reserve",)}
_FOLDERS = ("/usr/libexec", "/usr/local/bin", "/opt/homebrew/bin", "/opt/local/bin")


def required_devices(arch: Arch) -> tuple[str, ...]:
    """What every machine of ours needs."""
    ports = ("pcie-root-port",) if arch.bus == "pcie" else ()
    return (*(virtio(kind, arch.bus) for kind in ("blk", "net", "serial")), "virtserialport", *ports)


def interesting_devices(arch: Arch) -> tuple[str, ...]:
    """What is asked for: the required ones first."""
    files = "vhost-user-fs-ccw" if arch.bus == "ccw" else "vhost-user-fs-pci"
    return (*required_devices(arch), virtio("rng", arch.bus), virtio("9p", arch.bus), files, *_OPTIONAL)


def find_qemu(arch: Arch) -> Path | None:
    """The emulator for `arch`: `QVM_QEMU` (a folder or a binary) alone when set, else PATH and the usual folders."""
    override = os.environ.get("QVM_QEMU")
    if override:
        return _find_override(Path(override).expanduser(), arch)
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), *_FOLDERS])
    found = shutil.which(arch.qemu_binary, path=search)
    if found is None and find_arch(platform.machine()) == arch:
        found = shutil.which("qemu-kvm", path="/usr/libexec")  # what RHEL calls it
    return Path(found) if found else None


def _find_override(path: Path, arch: Arch) -> Path | None:
    if path.is_dir():
        candidate = path / arch.qemu_binary
    elif path.name.startswith("qemu-system-"):
        candidate = path.with_name(arch.qemu_binary)  # one binary named, the other architecture wanted
    else:
        candidate = path
    return candidate.absolute() if candidate.is_file() and os.access(candidate, os.X_OK) else None


def probe_qemu(arch: Arch, *, timeout: float = PROBE_TIMEOUT) -> QemuFeatures:
    """What this host's QEMU for `arch` can do; remembered until the binary or the kernel changes.

    Raises QemuMissingError or QemuTooOldError with the package to install, QemuError with QEMU's own words where it
    does not run, or lacks what every machine of ours needs.
    """
    binary = find_qemu(arch)
    if binary is None:
        raise _missing(arch)
    build = file_identity(binary)
    # The kernel is part of it: io_uring is its feature as much as QEMU's.
    key = f"{FORMAT}:{build}:{platform.release()}"
    name = f"qemu-{hashlib.sha256(os.fsencode(binary.resolve())).hexdigest()[:16]}.json"
    features = _remembered(name, key)
    if features is None:
        features = run_probe(binary, arch, timeout=timeout)
        save_entry(name, key, features.to_dict())
    # Never remembered: another package's files, and looked at in a millisecond.
    return replace(features, binary=binary, build=build, firmware=find_firmware(arch, binary))


def _missing(arch: Arch) -> QemuMissingError:
    override = os.environ.get("QVM_QEMU")
    if override:
        return QemuMissingError(f"QVM_QEMU is {override}, and there is no {arch.qemu_binary} there",
                                hint=f"correct it, or unset it and install QEMU: {qemu_hint(arch)}")
    return QemuMissingError(f"{arch.qemu_binary} is not installed", hint=qemu_hint(arch))


def _remembered(name: str, key: str) -> QemuFeatures | None:
    value = load_entry(name, key)
    if value is None:
        return None
    try:
        return QemuFeatures.from_dict(value)
    except (KeyError, TypeError, ValueError):
        log.warning("the remembered answers in %s are damaged; asking QEMU again", name)
        return None


def run_probe(binary: Path, arch: Arch, *, timeout: float = PROBE_TIMEOUT) -> QemuFeatures:
    """Run `binary` once and ask it everything."""
    deadline = Deadline(timeout, "asking QEMU what it can do")
    argv = [str(binary), "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S",
            "-qmp", "stdio"]
    with tempfile.TemporaryFile() as words, tempfile.NamedTemporaryFile(prefix="qvm-probe-") as scratch:
        scratch.truncate(1024 * 1024)
        try:
            with converse(argv, stderr=words) as child:
                assert child.stdin is not None and child.stdout is not None
                wire = Wire(child.stdout.fileno(), child.stdin.fileno(), deadline)
                return _ask(wire, binary, arch, Path(scratch.name))
        except QemuTooOldError:
            raise
        except (QemuError, HostError, KeyError, TypeError, ValueError) as error:
            raise _failed(binary, error, words, arch) from error


def _failed(binary: Path, error: Exception, words: Any, arch: Arch) -> QemuError:
    words.seek(0)
    said = words.read().decode(errors="replace").strip()
    known = error.details if isinstance(error, QvmError) else None
    what = error.message if isinstance(error, QvmError) else f"its answer is not as expected ({error!r})"
    details = "\n".join(part for part in (known, said[-2000:]) if part)
    return QemuError(f"{binary} cannot be used: {what}", details=details or None,
                     hint=f"run `{binary} --version`; reinstalling may mend it: {qemu_hint(arch)}")


def _ask(wire: Wire, binary: Path, arch: Arch, scratch: Path) -> QemuFeatures:
    greeting = wire.greet()
    number = greeting["qemu"]
    version = (int(number["major"]), int(number["minor"]), int(number["micro"]))
    if version[:2] < OLDEST:
        raise QemuTooOldError(f"{binary} is version {'.'.join(map(str, version))}; qvm needs 7.0 or newer",
                              hint=f"upgrade it: {qemu_hint(arch)}")
    target = str(wire.execute("query-target")["arch"])
    if target != arch.qemu_target:
        raise QemuError(f"it emulates {target}, not {arch.qemu_target}")
    devices = {name: found for name in interesting_devices(arch) if (found := _properties(wire, name)) is not None}
    lacking = [device for device in required_devices(arch) if device not in devices]
    if lacking:
        raise QemuError(f"it was built without {', '.join(lacking)}")
    enums = _enum_values(wire.execute("query-qmp-schema"))
    return QemuFeatures(
        binary=binary,
        build=file_identity(binary),
        arch=arch.name,
        system=platform.system(),
        host_machine=platform.machine(),
        version=version,
        package=str(greeting.get("package", "")).strip(),
        machine=_machine(wire, arch),
        accels=tuple(accel for accel in ACCELS if _knows(wire, "qom-list-properties", f"{accel}-accel")),
        devices=tuple(devices),
        properties=tuple(f"{device}.{prop}" for device, props in PROPERTIES.items() for prop in props
                         if prop in devices.get(device, ())),
        netdevs=tuple(name for name in ("user", "stream", "vmnet-shared") if name in enums["hubport"]),
        sandbox=_has_sandbox(wire),
        io_uring="io_uring" in enums["threads"] and _opens_with_io_uring(wire, scratch),
    )


def _properties(wire: Wire, device: str) -> set[str] | None:
    try:
        return {str(prop["name"]) for prop in wire.execute("device-list-properties", {"typename": device})}
    except CommandRefusedError:
        return None


def _knows(wire: Wire, command: str, typename: str) -> bool:
    try:
        wire.execute(command, {"typename": typename})
    except CommandRefusedError:
        return False
    return True


def _machine(wire: Wire, arch: Arch) -> str:
    machines = wire.execute("query-machines")
    named = [str(entry["name"]) for entry in machines if arch.machine in (entry.get("alias"), entry["name"])]
    if not named:
        raise QemuError(f"it has no machine type {arch.machine}")
    return named[0]


def _enum_values(schema: list[dict[str, Any]]) -> dict[str, set[str]]:
    """The values of the enumerations that hold "hubport" (kinds of -netdev) and "threads" (kinds of disk I/O).

    The schema hides the names of types, so an enumeration is known by a member that only it has.
    """
    found: dict[str, set[str]] = {"hubport": set(), "threads": set()}
    for entity in schema:
        if entity["meta-type"] == "enum":
            values = set(entity["values"])
            for member in found:
                if member in values:
                    found[member] |= values
    return found


def _has_sandbox(wire: Wire) -> bool:
    try:
        options = wire.execute("query-command-line-options", {"option": "sandbox"})
    except CommandRefusedError:
        return False
    known = {str(parameter["name"]) for option in options for parameter in option["parameters"]}
    return {"obsolete", "elevateprivileges", "spawn", "resourcecontrol"} <= known


def _opens_with_io_uring(wire: Wire, scratch: Path) -> bool:
    """Whether the kernel allows it: container runtimes filter the calls, and kernel.io_uring_disabled exists."""
    try:
        wire.execute("blockdev-add", {"driver": "file", "node-name": "probe", "filename": str(scratch),
                                      "aio": "io_uring"})
    except CommandRefusedError:
        return False
    return True

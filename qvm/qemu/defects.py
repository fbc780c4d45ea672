"""Combinations of QEMU, guest and host that are known to fail in ways no probe of ours sees in time.

What can be tried out is tried out instead: an accelerator that aborts or hangs fails its proof (accel.py), a device
that is missing is seen by the probe, and an abort that strikes at random is answered by another start (machine.py).
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass

from qvm.arch import AARCH64, X86_64, Arch, find_arch
from qvm.errors import QemuTooOldError
from qvm.qemu.features import QemuFeatures
from qvm.qemu.packages import qemu_hint
from qvm.units import GiB

Version = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Machine:
    """What a defect may depend on."""

    arch: Arch
    accel: str
    features: QemuFeatures
    memory: int
    """Bytes."""
    mac_version: tuple[int, ...]
    """Of macOS; empty elsewhere."""


@dataclass(frozen=True, slots=True)
class Defect:
    what: str
    applies: Callable[[Machine], bool]
    mend: str | None
    """What to do where it is not upgrading QEMU."""
    source: str


def _tcg(arch: Arch, first: Version, fixed: Version) -> Callable[[Machine], bool]:
    return lambda machine: (
        machine.accel == "tcg" and machine.arch is arch and first <= machine.features.version < fixed
    )


def _panics_the_mac(machine: Machine) -> bool:
    return (machine.accel == "hvf" and machine.arch is AARCH64 and bool(machine.mac_version)
            and machine.mac_version < (12, 4) and machine.memory > 3 * GiB)  # fmt: skip


DEFECTS = (
    Defect(
        "x86_64 guests hang under software emulation with QEMU 8.1.0", _tcg(X86_64, (8, 1, 0), (8, 1, 1)), None,
        "https://gitlab.com/qemu-project/qemu/-/issues/1864, https://github.com/lima-vm/lima/issues/1758",
    ),
    Defect(
        "a VM of more than 3 GiB crashes the whole Mac under macOS before 12.4", _panics_the_mac,
        "upgrade macOS, or start with --memory 3",
        "https://gitlab.com/qemu-project/qemu/-/issues/903, https://github.com/lima-vm/lima/issues/795",
    ),
)


def mac_version() -> tuple[int, ...]:
    """(12, 3, 1) on such a Mac, () elsewhere."""
    text = platform.mac_ver()[0]
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def refuse_known_bad(features: QemuFeatures, accel: str, memory: int, *, mac: tuple[int, ...] | None = None) -> None:
    """QemuTooOldError, with what to install, where this machine is known to fail."""
    arch = find_arch(features.arch)
    assert arch is not None, "features are only made for architectures of the table"
    machine = Machine(arch, accel, features, memory, mac_version() if mac is None else mac)
    for defect in DEFECTS:
        if defect.applies(machine):
            raise QemuTooOldError(f"{defect.what} (this is {features.version_text})", details=defect.source,
                                  hint=defect.mend or f"upgrade QEMU: {qemu_hint(arch)}")

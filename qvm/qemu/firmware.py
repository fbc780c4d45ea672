"""UEFI firmware: found through QEMU's firmware descriptors, else where distributions are known to put it.

Descriptors are specified in QEMU's docs/interop/firmware.json: JSON files in three folders of falling precedence; a
file hides those of the same name in later folders (an empty one hides and adds nothing), and names give the order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qvm.arch import AARCH64, ARMV7L, RISCV64, X86_64, Arch
from qvm.errors import HostError
from qvm.qemu.features import Firmware
from qvm.qemu.packages import firmware_hint

# Secure Boot would refuse kernels that are not signed by Microsoft's chain; SMM is slow without hardware support.
_UNWANTED = {"secure-boot", "enrolled-keys", "requires-smm"}
_MACHINES = {X86_64.name: "pc-q35-0.0"}
_ANY_MACHINE = "virt-0.0"

# For packages without descriptors: (code, variable template), in order of preference.
_KNOWN: dict[str, tuple[tuple[str, str], ...]] = {
    X86_64.name: (
        ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
        ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
        ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
        ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
        ("/opt/homebrew/share/qemu/edk2-x86_64-code.fd", "/opt/homebrew/share/qemu/edk2-i386-vars.fd"),
        ("/usr/local/share/qemu/edk2-x86_64-code.fd", "/usr/local/share/qemu/edk2-i386-vars.fd"),
        ("/usr/share/qemu/edk2-x86_64-code.fd", "/usr/share/qemu/edk2-i386-vars.fd"),
    ),
    AARCH64.name: (
        ("/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"),
        ("/usr/share/edk2/aarch64/QEMU_EFI-silent-pflash.raw", "/usr/share/edk2/aarch64/vars-template-pflash.raw"),
        ("/usr/share/edk2/aarch64/QEMU_CODE.fd", "/usr/share/edk2/aarch64/QEMU_VARS.fd"),
        ("/opt/homebrew/share/qemu/edk2-aarch64-code.fd", "/opt/homebrew/share/qemu/edk2-arm-vars.fd"),
        ("/usr/local/share/qemu/edk2-aarch64-code.fd", "/usr/local/share/qemu/edk2-arm-vars.fd"),
        ("/usr/share/qemu/edk2-aarch64-code.fd", "/usr/share/qemu/edk2-arm-vars.fd"),
    ),
    ARMV7L.name: (
        ("/usr/share/AAVMF/AAVMF32_CODE.fd", "/usr/share/AAVMF/AAVMF32_VARS.fd"),
        ("/opt/homebrew/share/qemu/edk2-arm-code.fd", "/opt/homebrew/share/qemu/edk2-arm-vars.fd"),
        ("/usr/local/share/qemu/edk2-arm-code.fd", "/usr/local/share/qemu/edk2-arm-vars.fd"),
        ("/usr/share/qemu/edk2-arm-code.fd", "/usr/share/qemu/edk2-arm-vars.fd"),
    ),
    RISCV64.name: (
        ("/usr/share/qemu-efi-riscv64/RISCV_VIRT_CODE.fd", "/usr/share/qemu-efi-riscv64/RISCV_VIRT_VARS.fd"),
        ("/usr/share/edk2/riscv/RISCV_VIRT_CODE.fd", "/usr/share/edk2/riscv/RISCV_VIRT_VARS.fd"),
        ("/opt/homebrew/share/qemu/edk2-riscv-code.fd", "/opt/homebrew/share/qemu/edk2-riscv-vars.fd"),
        ("/usr/share/qemu/edk2-riscv-code.fd", "/usr/share/qemu/edk2-riscv-vars.fd"),
    ),
}


def descriptor_folders(binary: Path) -> list[Path]:
    """Where firmware descriptors of this host's QEMU may lie, the most important first."""
    prefix = binary.resolve().parent.parent
    shares = [prefix / "share", Path("/usr/share"), Path("/opt/homebrew/share"), Path("/usr/local/share")]
    return [
        Path.home() / ".config/qemu/firmware",
        Path("/etc/qemu/firmware"),
        *(share / "qemu/firmware" for share in shares),
    ]


def find_firmware(arch: Arch, binary: Path) -> Firmware | None:
    """The UEFI firmware for `arch`; None where the host has none, or the machine needs none."""
    if not arch.has_uefi:
        return None
    return find_described(arch, descriptor_folders(binary)) or _find_known(arch)


def find_described(arch: Arch, folders: Iterable[Path]) -> Firmware | None:
    """The first usable firmware that the descriptors in `folders` name and that is there."""
    files: dict[str, Path] = {}
    for folder in folders:
        for path in folder.glob("*.json"):
            files.setdefault(path.name, path)
    for _, path in sorted(files.items()):
        try:
            firmware = parse_descriptor(json.loads(path.read_text()), arch)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # an empty file hides its namesakes; a broken one is not ours to judge
        if firmware is not None and firmware.code.is_file() and firmware.variables.is_file():
            return firmware
    return None


def parse_descriptor(data: Mapping[str, Any], arch: Arch) -> Firmware | None:
    """The firmware a descriptor describes; None where it is not for our machines. KeyError on a malformed one."""
    mapping = data["mapping"]
    fits = any(
        target["architecture"] == arch.qemu_target
        and any(fnmatch(_MACHINES.get(arch.name, _ANY_MACHINE), pattern) for pattern in target["machines"])
        for target in data["targets"]
    )
    usable = (
        "uefi" in data["interface-types"]
        and mapping["device"] == "flash"
        and mapping.get("mode", "split") == "split"
        and not _UNWANTED & set(data["features"])
    )
    if not (fits and usable):
        return None
    code, variables = mapping["executable"], mapping["nvram-template"]
    if code["format"] != "raw" or variables["format"] != "raw":
        return None
    return Firmware(Path(code["filename"]), Path(variables["filename"]))


def _find_known(arch: Arch) -> Firmware | None:
    pairs = (Firmware(Path(code), Path(variables)) for code, variables in _KNOWN.get(arch.name, ()))
    return next((pair for pair in pairs if pair.code.is_file() and pair.variables.is_file()), None)


def missing_firmware_error(arch: Arch) -> HostError:
    """For an image that boots by UEFI on a host that has no such firmware."""
    return HostError(f"this image boots by UEFI, and the host has no UEFI firmware for {arch.name}",
                     hint=firmware_hint(arch))

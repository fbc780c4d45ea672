"""What to type on this host to install QEMU or its firmware: the hint of every "missing" error."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

from qvm.arch import AARCH64, X86_64, Arch

OS_RELEASE = Path("/etc/os-release")

_INSTALL = {
    "apt": "sudo apt install",
    "dnf": "sudo dnf install",
    "pacman": "sudo pacman -S",
    "zypper": "sudo zypper install",
    "apk": "sudo apk add",
    "brew": "brew install",
}
# ID and ID_LIKE of os-release(5) -> package manager
_MANAGERS = {
    "debian": "apt", "ubuntu": "apt",
    "fedora": "dnf", "rhel": "dnf", "centos": "dnf",
    "arch": "pacman",
    "suse": "zypper", "opensuse": "zypper",
    "alpine": "apk",
}
_QEMU = {
    ("apt", X86_64.name): X86_64.qemu_package,
    ("apt", AARCH64.name): AARCH64.qemu_package,
    ("dnf", X86_64.name): "qemu-system-x86",
    ("dnf", AARCH64.name): "qemu-system-aarch64",
    ("pacman", X86_64.name): "qemu-system-x86",
    ("pacman", AARCH64.name): "qemu-system-aarch64",
    ("zypper", X86_64.name): "qemu-x86",
    ("zypper", AARCH64.name): "qemu-arm",
    ("apk", X86_64.name): "qemu-system-x86_64",
    ("apk", AARCH64.name): "qemu-system-aarch64",
    ("brew", X86_64.name): "qemu",
    ("brew", AARCH64.name): "qemu",
}
_FIRMWARE = {
    ("apt", X86_64.name): "ovmf",
    ("apt", AARCH64.name): "qemu-efi-aarch64",
    ("dnf", X86_64.name): "edk2-ovmf",
    ("dnf", AARCH64.name): "edk2-aarch64",
    ("pacman", X86_64.name): "edk2-ovmf",
    ("pacman", AARCH64.name): "edk2-aarch64",
    ("zypper", X86_64.name): "qemu-ovmf-x86_64",
    ("zypper", AARCH64.name): "qemu-uefi-aarch64",
    ("apk", X86_64.name): "ovmf",
    ("apk", AARCH64.name): "aavmf",
    ("brew", X86_64.name): "qemu",
    ("brew", AARCH64.name): "qemu",
}


def parse_os_release(text: str) -> dict[str, str]:
    """The assignments of an os-release(5) file, quotes removed."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return {name.strip(): value.strip().strip("\"'") for name, _, value in pairs}


def find_manager(os_release: Mapping[str, str], system: str) -> str | None:
    """The package manager of a host: a key of the tables above, None for one we do not know."""
    if system == "Darwin":
        return "brew"
    families = [os_release.get("ID", ""), *os_release.get("ID_LIKE", "").split()]
    for family in families:
        for known, manager in _MANAGERS.items():
            if family == known or family.startswith(f"{known}-"):
                return manager
    return None


def _manager() -> str | None:
    try:
        text = OS_RELEASE.read_text(errors="replace")
    except OSError:
        text = ""
    return find_manager(parse_os_release(text), platform.system())


def qemu_hint(arch: Arch, manager: str | None = None) -> str:
    """How to install the emulator for `arch` on this host (or with a named package manager)."""
    manager = manager or _manager()
    if manager is None:
        return f"install QEMU for {arch.name} with your package manager, or set QVM_QEMU to its folder"
    return f"{_INSTALL[manager]} {_QEMU[manager, arch.name]}"


def firmware_hint(arch: Arch, manager: str | None = None) -> str:
    """How to install the UEFI firmware for `arch` on this host (or with a named package manager)."""
    manager = manager or _manager()
    if manager is None:
        return f"install the UEFI firmware (EDK II) for {arch.name} with your package manager"
    return f"{_INSTALL[manager]} {_FIRMWARE[manager, arch.name]}"

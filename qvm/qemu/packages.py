"""What to type on this host to install QEMU or its firmware: the hint of every "missing" error."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from qvm import process
from qvm.arch import Arch

_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._-]*")
OS_RELEASE = Path("/etc/os-release")

_INSTALL = {
    "apt": "sudo apt install",
    "dnf": "sudo dnf install",
    "pacman": "sudo pacman -S",
    "zypper": "sudo zypper install",
    "apk": "sudo apk add",
    "brew": "brew install",
}
_UNATTENDED = {
    "apt": ("apt-get", "install", "-y"),
    "dnf": ("dnf", "install", "-y"),
    "pacman": ("pacman", "-S", "--noconfirm"),
    "zypper": ("zypper", "--non-interactive", "install"),
    "apk": ("apk", "add"),
    "brew": ("brew", "install"),
}
# ID and ID_LIKE of os-release(5) -> package manager
_MANAGERS = {
    "debian": "apt", "ubuntu": "apt",
    "fedora": "dnf", "rhel": "dnf", "centos": "dnf",
    "arch": "pacman",
    "suse": "zypper", "opensuse": "zypper",
    "alpine": "apk",
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
    names = arch.qemu_packages[manager]
    return f"{_INSTALL[manager]} {_first_known(names) if manager == 'apt' else names[0]}"


def _first_known(names: Sequence[str]) -> str:
    """The first of a package's names that this host's apt has: releases split what others have in one."""
    if len(names) > 1 and process.find_program("apt-cache") is not None:
        for name in names:
            done = process.run(["apt-cache", "show", "--no-all-versions", "--", name], check=False, timeout=20.0)
            if done.returncode == 0 and done.stdout:
                return name
    return names[0]


def firmware_hint(arch: Arch, manager: str | None = None) -> str:
    """How to install the UEFI firmware for `arch` on this host (or with a named package manager)."""
    manager = manager or _manager()
    if manager is None or manager not in arch.firmware_packages:
        return f"install the UEFI firmware (EDK II) for {arch.name} with your package manager"
    return f"{_INSTALL[manager]} {arch.firmware_packages[manager]}"


def install_argv(hint: str, *, root: bool) -> list[str] | None:
    """The program that does what an install command of ours says, without asking; None where `hint` is no such command.

    `root`: whether we are; else sudo is called.
    """
    for manager, command in _INSTALL.items():
        if hint.startswith(f"{command} "):
            packages = hint.removeprefix(command).split()
            if packages and all(_PACKAGE.fullmatch(package) for package in packages):
                sudo = ["sudo"] if command.startswith("sudo ") and not root else []
                return [*sudo, *_UNATTENDED[manager], *packages]
    return None

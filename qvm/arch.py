"""Every CPU architecture in every vocabulary qvm speaks; the one table."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from qvm.errors import UsageError


@dataclass(frozen=True, slots=True)
class Arch:
    """One architecture. `name` is the kernel's (`uname -m`) and QEMU's word for it."""

    name: str
    debian: str
    oci: str
    go: str
    machine: str
    """QEMU machine type."""
    console: str
    """Serial console device as the kernel names it."""
    qemu_package: str
    """Debian package with the system emulator."""
    kernel_package: str
    """Debian's generic kernel (its cloud kernel has no 9p)."""
    aliases: tuple[str, ...] = ()

    @property
    def qemu_binary(self) -> str:
        return f"qemu-system-{self.name}"


X86_64 = Arch("x86_64", debian="amd64", oci="amd64", go="amd64", machine="q35", console="ttyS0",
              qemu_package="qemu-system-x86", kernel_package="linux-image-amd64", aliases=("amd64", "x64"))
AARCH64 = Arch("aarch64", debian="arm64", oci="arm64", go="arm64", machine="virt", console="ttyAMA0",
               qemu_package="qemu-system-arm", kernel_package="linux-image-arm64", aliases=("arm64",))

ALL = (X86_64, AARCH64)


def find_arch(name: str) -> Arch | None:
    """The architecture called `name` in any vocabulary, else None."""
    wanted = name.lower()
    return next((arch for arch in ALL if wanted in (arch.name, arch.debian, arch.oci, *arch.aliases)), None)


def host_arch() -> Arch:
    """The architecture of this host; UsageError on one qvm has no guest for."""
    arch = find_arch(platform.machine())
    if arch is None:
        raise UsageError(f"this host's architecture {platform.machine()!r} is not supported yet",
                         hint="supported: " + ", ".join(arch.name for arch in ALL))
    return arch

"""Every CPU architecture in every vocabulary qvm speaks; the one table.

Machines as QEMU 7.0 to 10.x have them (docs/system/target-*.rst), kernels and packages as Debian 12 and 13 name them.
What of it is measured stands with its figures in ARCHITECTURE.md.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from qvm.errors import UsageError

_GIB = 1 << 30

Bus = Literal["pcie", "pci", "ccw"]
"""What virtio devices sit on: PCI Express with hot-plug ports, conventional PCI, or s390x's channel subsystem."""
MemoryPlug = Literal["dimm", "virtio-mem", "none"]
"""How a guest whose kernel was booted directly gets more memory while it runs."""


@dataclass(frozen=True, slots=True)
class Arch:
    """One architecture. `name` is the kernel's word (`uname -m`), and qvm's own."""

    name: str
    debian: str
    """Also Ubuntu's word, in the names of their cloud images; the other distributions' say `name`."""
    oci: str
    go: str
    machine: str
    """QEMU machine type."""
    console: str
    """Serial console device as the kernel names it."""
    kernel_package: str
    """Debian's generic kernel (its cloud kernel has no 9p)."""
    tcg_cpu: str
    """CPU model under software emulation: the fastest of those measured."""
    qemu_packages: Mapping[str, tuple[str, ...]]
    """Package manager -> packages with the system emulator, the newest name first."""
    firmware_packages: Mapping[str, str]
    """Package manager -> package with the UEFI firmware; empty where the machine brings firmware of its own."""
    aliases: tuple[str, ...] = ()
    qemu: str = ""
    """QEMU's word where it is not `name`."""
    oci_variant: str = ""
    goarm: str = ""
    bus: Bus = "pcie"
    memory_plug: MemoryPlug = "none"
    ram_start: int = 0
    """Where RAM begins in the guest's address space (QEMU: hw/*/virt.c)."""
    memory_limit: int | None = None
    """Bytes of RAM such a machine can have; None: as much as the host gives."""
    strong_order: bool = False
    """Whether its memory model is stronger than Arm's."""
    restores_from: tuple[int, int, int] | None = (0, 0, 0)
    """The QEMU from which on a machine goes on from a saved state (tried out, see ARCHITECTURE.md); None: with none."""
    user_emulator: str = field(default="")
    """QEMU's user emulator and its binfmt_misc entry, without "qemu-", where it is not `name`."""

    @property
    def qemu_target(self) -> str:
        return self.qemu or self.name

    @property
    def qemu_binary(self) -> str:
        return f"qemu-system-{self.qemu_target}"

    @property
    def binfmt(self) -> str:
        """The name of the user emulator's program and of its binfmt_misc entry."""
        return f"qemu-{self.user_emulator or self.name}"

    @property
    def oci_platform(self) -> str:
        """As `docker run --platform` takes it."""
        return "/".join(word for word in ("linux", self.oci, self.oci_variant) if word)

    @property
    def has_uefi(self) -> bool:
        """Whether a disk is booted by UEFI; else the machine's own firmware does (SLOF, s390-ccw)."""
        return bool(self.firmware_packages)

    @property
    def qemu_package(self) -> str:
        """Debian's package with the system emulator, by its newest name."""
        return self.qemu_packages["apt"][0]

    @property
    def go_environment(self) -> dict[str, str]:
        """What tells the Go tool to build for it."""
        return {"GOARCH": self.go, **({"GOARM": self.goarm} if self.goarm else {})}


def _packages(apt: str | tuple[str, ...], dnf: str, pacman: str, zypper: str, apk: str) -> dict[str, tuple[str, ...]]:
    return {"apt": (apt,) if isinstance(apt, str) else apt, "dnf": (dnf,), "pacman": (pacman,), "zypper": (zypper,),
            "apk": (apk,), "brew": ("qemu",)}  # fmt: skip


X86_64 = Arch(
    "x86_64", debian="amd64", oci="amd64", go="amd64", machine="q35", console="ttyS0", aliases=("x64",),
    kernel_package="linux-image-amd64", tcg_cpu="max,-erms,-fsrm", memory_plug="dimm", strong_order=True,
    qemu_packages=_packages("qemu-system-x86", "qemu-system-x86", "qemu-system-x86", "qemu-x86", "qemu-system-x86_64"),
    firmware_packages={"apt": "ovmf", "dnf": "edk2-ovmf", "pacman": "edk2-ovmf", "zypper": "qemu-ovmf-x86_64",
                       "apk": "ovmf", "brew": "qemu"},
)  # fmt: skip
AARCH64 = Arch(
    "aarch64", debian="arm64", oci="arm64", go="arm64", machine="virt", console="ttyAMA0",
    kernel_package="linux-image-arm64", tcg_cpu="max,pauth=off,lpa2=off", ram_start=_GIB,
    qemu_packages=_packages("qemu-system-arm", "qemu-system-aarch64", "qemu-system-aarch64", "qemu-arm",
                            "qemu-system-aarch64"),
    firmware_packages={"apt": "qemu-efi-aarch64", "dnf": "edk2-aarch64", "pacman": "edk2-aarch64",
                       "zypper": "qemu-uefi-aarch64", "apk": "aavmf", "brew": "qemu"},
)  # fmt: skip
ARMV7L = Arch(
    "armv7l", debian="armhf", oci="arm", oci_variant="v7", go="arm", goarm="7", qemu="arm", user_emulator="arm",
    machine="virt", console="ttyAMA0", aliases=("armv7", "armhf", "arm/v7"),
    kernel_package="linux-image-armmp-lpae", tcg_cpu="max", ram_start=_GIB,
    # 32 bits of address, one GiB of them the devices'; above it, QEMU before 8 and 32-bit kernels disagree at times.
    memory_limit=3 * _GIB,
    qemu_packages=_packages("qemu-system-arm", "qemu-system-arm", "qemu-system-arm", "qemu-arm", "qemu-system-arm"),
    firmware_packages={"apt": "qemu-efi-arm", "dnf": "edk2-arm", "pacman": "edk2-arm", "zypper": "qemu-uefi-aarch32",
                       "apk": "aavmf", "brew": "qemu"},
)  # fmt: skip
RISCV64 = Arch(
    "riscv64", debian="riscv64", oci="riscv64", go="riscv64", machine="virt", console="ttyS0",
    kernel_package="linux-image-riscv64", tcg_cpu="rv64", ram_start=2 * _GIB,
    restores_from=(10, 0, 0),
    qemu_packages=_packages(("qemu-system-riscv", "qemu-system-misc"), "qemu-system-riscv", "qemu-system-riscv",
                            "qemu-extra", "qemu-system-riscv64"),
    firmware_packages={"apt": "qemu-efi-riscv64", "dnf": "edk2-riscv64", "pacman": "edk2-riscv64",
                       "zypper": "qemu-uefi-riscv64", "apk": "edk2-riscv64", "brew": "qemu"},
)  # fmt: skip
PPC64LE = Arch(
    "ppc64le", debian="ppc64el", oci="ppc64le", go="ppc64le", qemu="ppc64", machine="pseries", console="hvc0",
    kernel_package="linux-image-powerpc64le", tcg_cpu="power9", bus="pci",
    restores_from=None,
    qemu_packages=_packages("qemu-system-ppc", "qemu-system-ppc", "qemu-system-ppc", "qemu-ppc", "qemu-system-ppc64"),
    firmware_packages={},
)  # fmt: skip
S390X = Arch(
    "s390x", debian="s390x", oci="s390x", go="s390x", machine="s390-ccw-virtio", console="ttysclp0",
    kernel_package="linux-image-s390x", tcg_cpu="max", bus="ccw", strong_order=True,
    qemu_packages=_packages(("qemu-system-s390x", "qemu-system-misc"), "qemu-system-s390x", "qemu-system-s390x",
                            "qemu-s390x", "qemu-system-s390x"),
    firmware_packages={},
)  # fmt: skip

ALL = (X86_64, AARCH64, ARMV7L, RISCV64, PPC64LE, S390X)
HOSTS = (X86_64, AARCH64)
"""Those qvm itself runs on."""


def names() -> tuple[str, ...]:
    return tuple(arch.name for arch in ALL)


def platforms(emulators: Iterable[str]) -> list[str]:
    """The OCI platforms that binfmt_misc entries of those names run: `linux/arm64` for `qemu-aarch64`."""
    known = {arch.binfmt: arch.oci_platform for arch in ALL} | {"qemu-i386": "linux/386"}
    return sorted(known[name] for name in emulators if name in known)


def find_arch(name: str) -> Arch | None:
    """The architecture called `name` in any vocabulary, else None."""
    wanted = name.lower().removeprefix("linux/")
    return next((arch for arch in ALL if wanted in (arch.name, arch.debian, arch.oci, arch.go, *arch.aliases)), None)


def host_arch() -> Arch:
    """The architecture of this host; UsageError on one qvm does not run on."""
    arch = find_arch(platform.machine())
    if arch not in HOSTS:
        raise UsageError(f"this host's architecture {platform.machine()!r} is not supported yet",
                         hint="supported: " + ", ".join(arch.name for arch in HOSTS))
    return arch

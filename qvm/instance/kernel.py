"""How an image boots: by a kernel beside its disk, with a command line made here, or by firmware."""

from __future__ import annotations

from pathlib import Path

from qvm.arch import X86_64, Arch
from qvm.instance.spec import KernelBoot


def kernel_boot(kernel: Path | None, initrd: Path | None, cmdline: str, arch: Arch, accel: str) -> KernelBoot | None:
    """How an image with these files boots; None where it has no kernel of its own beside its disk (UEFI)."""
    if kernel is None or initrd is None:
        return None
    return KernelBoot(kernel, initrd, kernel_cmdline(cmdline, arch, accel))


def kernel_cmdline(base: str, arch: Arch, accel: str) -> str:
    """The kernel command line of an image that qvm built.

    cloud-init stays off there: the agent applies the same seed in a fraction of the time (ARCHITECTURE.md has the
    figures). Speculation mitigations guard against side channels of the CPU that TCG does not have, and cost much.
    """
    words = [base, f"console={arch.console}", "cloud-init=disabled"]
    if arch is X86_64:
        # Memory can be hot-plugged, for which Linux would keep 64 MiB of bounce buffers that no virtio device needs.
        words.append("swiotlb=noforce")
    if accel == "tcg":
        words.append("mitigations=off")
    return " ".join(word for word in words if word)

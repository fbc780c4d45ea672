"""The words of QEMU's command line for board, accelerator, CPU and memory, and what the kernel is told of them. Pure.

Which of them were measured, and the figures, are in ARCHITECTURE.md ("Settings under emulation").
"""

from __future__ import annotations

from pathlib import Path

from qvm.arch import AARCH64, ARMV7L, PPC64LE, X86_64, Arch, find_arch
from qvm.errors import QemuError, UsageError
from qvm.instance.spec import InstanceSpec
from qvm.qemu.features import QemuFeatures
from qvm.qemu.words import Value, option
from qvm.units import GiB, MiB, format_size

MEMORY_SLOTS = 4
"""DIMMs that can be plugged into a running guest."""
PLUGGABLE_MEMORY = 64 * GiB
"""Bytes of them; an address range that costs nothing until something is plugged in."""
TCG_CACHE = 512
"""MiB of translated code. QEMU's default is a fraction of that for small guests, and a boot overflows it."""


def arch_of(name: str) -> Arch:
    """The architecture of a spec or of features, which are only made for those of the table."""
    arch = find_arch(name)
    if arch is None:
        raise QemuError(f"{name!r} is not an architecture qvm knows")
    return arch


def machine(spec: InstanceSpec, features: QemuFeatures) -> list[str]:
    """Board, accelerator, CPU, memory. Nothing on the board that no guest of ours uses: each costs boot time."""
    arch = arch_of(spec.arch)
    return [
        *option("-machine", arch.machine,
                # What describes the state to people would follow it; the saver we use (state.py) leaves it out.
                {**board(arch, spec.accel, features), "memory-backend": "ram", "suppress-vmdesc": True}),
        *accelerator(arch, spec.accel, features),
        *option("-smp", "", {"cpus": spec.cpus, "sockets": 1, "cores": spec.cpus, "threads": 1}),
        *_memory(arch, spec),
        *option("-rtc", "", {"base": "utc"}),
    ]


def board(arch: Arch, accel: str, features: QemuFeatures) -> dict[str, Value]:
    """Properties of the machine type; the accelerator's proof runs on the same board."""
    if arch is X86_64:
        return {"smm": False, "vmport": False, "sata": False}
    if arch in (AARCH64, ARMV7L):
        return {"gic-version": _interrupt_controller(accel, features)}
    if arch is PPC64LE and accel == "tcg":
        # An emulated CPU does not speculate; announcing cures of that makes QEMU warn and the guest slower.
        return {"cap-cfpc": "broken", "cap-sbbc": "broken", "cap-ibs": "broken", "cap-ccf-assist": False}
    return {}


def accelerator(arch: Arch, accel: str, features: QemuFeatures) -> list[str]:
    """-accel and -cpu. The same words serve the machine and the accelerator's proof."""
    if accel != "tcg":
        return ["-accel", accel, "-cpu", "host"]
    # Where a guest expects stronger memory ordering than an Arm host gives QEMU chooses the threading itself.
    weaker = arch.strong_order and features.host_machine not in ("x86_64", "AMD64")
    return [
        *option("-accel", "tcg", {"thread": None if weaker else "multi", "tb-size": TCG_CACHE}),
        "-cpu", arch.tcg_cpu,
    ]


def _interrupt_controller(accel: str, features: QemuFeatures) -> str:
    """KVM gives the host's own. HVF learnt version 3 with QEMU 8.0; version 2 ends at eight CPUs."""
    if accel == "kvm":
        return "host"
    return "2" if accel == "hvf" and features.version < (8, 0, 0) else "3"


def _memory(arch: Arch, spec: InstanceSpec) -> list[str]:
    if arch.memory_limit is not None and spec.memory > arch.memory_limit:
        raise UsageError(f"an {arch.name} machine has at most {format_size(arch.memory_limit)} of memory",
                         hint=f"start with less: --memory {arch.memory_limit // GiB}")
    pluggable = can_plug_memory(spec)
    return [
        *_memory_backend("ram", spec.memory, spec.ram_file, shared=spec.ram_shared),
        *option("-m", "", {
            "size": f"{spec.memory // MiB}M",
            "slots": MEMORY_SLOTS if pluggable else None,
            "maxmem": f"{(spec.memory + PLUGGABLE_MEMORY) // MiB}M" if pluggable else None,
        }),
        *(word for dimm in spec.dimms for word in (
            *_memory_backend(f"mem-{dimm.id}", dimm.size, dimm.file, shared=False),
            *option("-device", "pc-dimm", {"id": dimm.id, "memdev": f"mem-{dimm.id}"}),
        )),
    ]


def _memory_backend(name: str, size: int, file: Path | None, *, shared: bool) -> list[str]:
    backend: dict[str, Value] = {"id": name, "size": f"{size // MiB}M"}
    if file is None:
        return option("-object", "memory-backend-ram", backend)
    return option("-object", "memory-backend-file", {**backend, "mem-path": file, "share": shared})


def can_plug_memory(spec: InstanceSpec) -> bool:
    """A running Arm guest hears of new memory through ACPI, which only the firmware brings; HVF's address space on
    the first Apple chips is too small to set any aside."""
    return spec.arch == X86_64.name or (spec.arch == AARCH64.name and spec.boot is None and spec.accel != "hvf")


# Targets whose translations are free of the address they run at (CF_PCREL), as of the QEMU named.
_RELOCATABLE = {"x86_64": (9, 0, 0), "aarch64": (9, 0, 0), "armv7l": (9, 0, 0), "riscv64": (9, 0, 0)}


def kernel_words(spec: InstanceSpec, features: QemuFeatures) -> tuple[str, ...]:
    """What this QEMU wants of the guest's kernel.

    QEMU's stable releases from 7.2.9, 8.1.5 and 8.2.1 on keep translated code by virtual address ("accel/tcg: Revert
    mapping of PCREL translation block to multiple virtual addresses"); 9.0 has a better cure. There, every program that
    starts at addresses of its own has the loader, libc and itself translated anew: 1850 blocks for `true`. Without
    address randomisation in the guest's programs it starts in less than half the time, and docker takes a quarter less
    of the CPU. That takes a defence from programs in the guest, not from the host's: the VM is the boundary.
    """
    relocatable = features.version >= _RELOCATABLE.get(spec.arch, (999,))
    return ("norandmaps",) if spec.accel == "tcg" and not relocatable else ()

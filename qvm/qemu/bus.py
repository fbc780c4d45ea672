"""Where a machine's virtio devices sit, and what they are called there. Pure.

Places are fixed here, once, for all machine types: a guest sees the same devices at the same places whatever else it is
given, and a saved state fits the command line it was made under. Slots 0x01 to 0x1e of the root bus are free on q35,
virt and pseries alike; s390x has no PCI, and a slot becomes a range of eight device numbers of its channel subsystem.
"""

from __future__ import annotations

from qvm.arch import Bus

Place = dict[str, str | bool | None]

_ROOT = {"pcie": "pcie.0", "pci": "pci.0"}


def virtio(kind: str, bus: Bus) -> str:
    """QEMU's name of a virtio device: `virtio("blk", "pcie")` is virtio-blk-pci."""
    return f"virtio-{kind}-{'ccw' if bus == 'ccw' else 'pci'}"


def place(bus: Bus, slot: int, function: int | None = None) -> Place:
    """Bus and address; a `function` number (0 to 7) puts up to eight devices on one slot."""
    if bus == "ccw":
        return {"devno": f"fe.0.{slot * 8 + (function or 0):04x}"}
    if function is None:
        return {"bus": _ROOT[bus], "addr": f"{slot:#04x}"}
    return {"bus": _ROOT[bus], "addr": f"{slot:#04x}.{function:#x}", "multifunction": True if function == 0 else None}

"""What a disk from elsewhere is for: whether UEFI can boot it, and on which architecture.

Firmware that has never seen a disk starts `EFI/BOOT/BOOT<arch>.EFI` of its EFI system partition (UEFI 2.10, 3.5.1.1),
so that file says what the disk is for; types of root partitions say it too.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

from qvm.errors import ImageError
from qvm.image.fat import Fat, FatError
from qvm.image.partitions import ARCHITECTURES, Partition, read_partitions

# Removable media path -> architecture and the PE machine type of the program there (PE/COFF, "Machine Types").
LOADERS = {
    "BOOTX64.EFI": ("x86_64", 0x8664),
    "BOOTAA64.EFI": ("aarch64", 0xAA64),
    "BOOTRISCV64.EFI": ("riscv64", 0x5064),
    "BOOTARM.EFI": ("armv7l", 0x01C2),
}


def find_architectures(disk: Path) -> list[str]:
    """The architectures whose firmware can boot this raw disk; ImageError with the reason where none can."""
    size = disk.stat().st_size
    with disk.open("rb") as file:
        partitions = read_partitions(file, size)
        systems = [partition for partition in partitions if partition.is_esp]
        if not systems:
            raise ImageError(
                "it has no EFI system partition: it boots by BIOS only, if at all",
                hint="take the publisher's UEFI image (often called `uefi` or `generic`); qvm boots disks by UEFI",
            )
        names, flaws = set[str](), []
        for partition in systems:
            try:
                names |= _loaders(file, partition)
            except FatError as error:
                flaws.append(str(error))
        if not names and flaws:
            raise ImageError(f"its EFI system partition cannot be read: {flaws[0]}")
    if not names:
        raise ImageError("its EFI system partition has no boot loader at EFI/BOOT, where firmware looks for one",
                         hint="install it with `grub-install --removable`, where the image was made")
    typed = {ARCHITECTURES[kind] for partition in partitions
             if isinstance(kind := partition.type, UUID) and kind in ARCHITECTURES}
    # A disk may carry loaders for several; its root partition decides where it says so.
    return sorted(names & typed or names)


def _loaders(disk: BinaryIO, partition: Partition) -> set[str]:
    fat = Fat(disk, partition.start, partition.size)
    found = set()
    for name, (arch, machine) in LOADERS.items():
        entry = fat.find(f"EFI/BOOT/{name}")
        if entry is not None and not entry.is_folder and _pe_machine(fat.read(entry, 4096)) == machine:
            found.add(arch)
    return found


def _pe_machine(data: bytes) -> int | None:
    """The machine type of a PE program; None where it is none."""
    if len(data) < 64 or not data.startswith(b"MZ"):
        return None
    at = int(struct.unpack_from("<I", data, 60)[0])
    if data[at : at + 4] != b"PE\0\0" or at + 6 > len(data):
        return None
    return int(struct.unpack_from("<H", data, at + 4)[0])

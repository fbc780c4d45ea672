"""The partitions of a raw disk (UEFI specification 2.10, chapter 5), read without trusting a byte of it."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO
from uuid import UUID

from qvm.errors import ImageError

ESP = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
_ESP_MBR = 0xEF
_PROTECTIVE = 0xEE
_MAX_ENTRIES = 1024

# The Discoverable Partitions Specification: root and /usr partitions that say which architecture they are for.
ARCHITECTURES = {
    UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709"): "x86_64",
    UUID("8484680c-9521-48c6-9c11-b0720656f69e"): "x86_64",
    UUID("b921b045-1df0-41c3-af44-4c6f280d3fae"): "aarch64",
    UUID("b0e01050-ee5f-4390-949a-9101b17104e9"): "aarch64",
    UUID("72ec70a6-cf74-40e6-bd49-4bda08e8f224"): "riscv64",
    UUID("beaec34b-8442-439b-a40b-984381ed097d"): "riscv64",
    UUID("69dad710-2ce4-4e3c-b16c-21a1d49abed3"): "armv7l",
    UUID("7d0359a3-02b3-4f0a-865c-654403e70625"): "armv7l",
    UUID("c31c45e6-3f39-412e-80fb-4809c4980599"): "ppc64le",
    UUID("15bb03af-77e7-4d4a-b12b-c0d084f7491c"): "ppc64le",
    UUID("5eead9a9-fe09-4a1e-a1d7-520d00531306"): "s390x",
    UUID("8a4f5770-50aa-4ed3-874a-99b710db6fea"): "s390x",
}


@dataclass(frozen=True, slots=True)
class Partition:
    start: int
    size: int
    """Both in bytes."""
    type: UUID | int
    """A GUID of GPT's, or a number of the MBR's."""

    @property
    def is_esp(self) -> bool:
        return self.type in (ESP, _ESP_MBR)


def read_partitions(disk: BinaryIO, size: int) -> list[Partition]:
    """The partitions of a disk of `size` bytes; ImageError where the table is damaged or the disk cut short."""
    mbr = _read(disk, 0, 512)
    if mbr[510:] != b"\x55\xaa":
        raise ImageError("it has no partition table", hint="qvm boots whole disks, not single file systems")
    for sector in (512, 4096):
        header = _read(disk, sector, 512)
        if header.startswith(b"EFI PART"):
            return _read_gpt(disk, size, sector, header)
    return _read_mbr(mbr, size)


def _read_mbr(mbr: bytes, size: int) -> list[Partition]:
    found = []
    for number in range(4):
        kind, start, sectors = struct.unpack_from("<4xB3xII", mbr, 446 + 16 * number)
        if not kind:
            continue
        if kind == _PROTECTIVE:
            raise ImageError("its partition table (GPT) is missing or damaged")
        if (start + sectors) * 512 > size:
            raise _cut_short()
        found.append(Partition(start * 512, sectors * 512, kind))
    if not found:
        raise ImageError("its partition table is empty", hint="qvm boots whole disks, not single file systems")
    return found


def _read_gpt(disk: BinaryIO, size: int, sector: int, header: bytes) -> list[Partition]:
    length, checksum = struct.unpack_from("<II", header, 12)
    if not 92 <= length <= 512 or zlib.crc32(header[:16] + bytes(4) + header[20:length]) != checksum:
        raise ImageError("its partition table (GPT) is damaged")
    backup, _, last = struct.unpack_from("<QQQ", header, 32)
    entries_at, count, entry_size, entries_checksum = struct.unpack_from("<QIII", header, 72)
    if max(backup, last) * sector >= size:
        raise _cut_short()
    if not (128 <= entry_size <= 4096 and entry_size % 8 == 0 and 0 < count <= _MAX_ENTRIES):
        raise ImageError("its partition table (GPT) is damaged")
    table = _read(disk, entries_at * sector, count * entry_size)
    if zlib.crc32(table) != entries_checksum:
        raise ImageError("its partition table (GPT) is damaged")
    found = []
    for at in range(0, len(table), entry_size):
        kind = UUID(bytes_le=table[at : at + 16])
        if not kind.int:
            continue
        start, end = struct.unpack_from("<QQ", table, at + 32)
        if not start <= end or (end + 1) * sector > size:
            raise _cut_short()
        found.append(Partition(start * sector, (end + 1 - start) * sector, kind))
    if not found:
        raise ImageError("its partition table is empty")
    return found


def _cut_short() -> ImageError:
    return ImageError("it is a truncated disk: its partition table describes a larger one",
                      hint="fetch or copy it again; compare its digest with the publisher's")


def _read(disk: BinaryIO, at: int, length: int) -> bytes:
    disk.seek(at)
    data = disk.read(length)
    if len(data) < length:
        raise _cut_short()
    return data

"""Read small files of a FAT file system (Microsoft's FAT specification 1.03), such as an EFI system partition is.

Reading only, of a disk from elsewhere: every number is checked before it leads anywhere, and chains have an end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_MAX_DIRECTORY = 2 << 20
_ATTR_VOLUME, _ATTR_FOLDER, _ATTR_LONG = 0x08, 0x10, 0x0F
_DELETED, _END = 0xE5, 0x00


class FatError(Exception):
    """It is no FAT file system, or a damaged one."""


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    is_folder: bool
    cluster: int
    size: int


class Fat:
    """A FAT12, FAT16 or FAT32 that begins at byte `start` of `disk`."""

    def __init__(self, disk: BinaryIO, start: int, size: int) -> None:
        self._disk, self._start, self._size = disk, start, size
        boot = self._read(0, 512)
        (sector, per_cluster, reserved, tables, root_entries, total16, _, per_fat16, _, _, _,
         total32, per_fat32) = struct.unpack_from("<HBHBHHBHHHIII", boot, 11)  # fmt: skip
        if boot[510:] != b"\x55\xaa" or sector not in (512, 1024, 2048, 4096) or per_cluster & (per_cluster - 1):
            raise FatError("no FAT boot sector")
        per_fat = per_fat16 or per_fat32
        if not (per_cluster and reserved and tables and per_fat):
            raise FatError("no FAT boot sector")
        root_size = -(-root_entries * 32 // sector) * sector
        self._cluster = per_cluster * sector
        self._table = reserved * sector
        self._root_at = self._table + tables * per_fat * sector
        self._root_size = root_size
        self._data = self._root_at + root_size
        total = (total16 or total32) * sector
        if total > size or self._data > total:
            raise FatError("the file system is larger than its partition")
        self._clusters = (total - self._data) // self._cluster
        # Those without FAT16's fields are FAT32 whatever their size, as Linux and mkfs have it.
        self._bits = 32 if not per_fat16 else 12 if self._clusters < 4085 else 16
        self._root = struct.unpack_from("<I", boot, 44)[0] if self._bits == 32 else 0

    def find(self, path: str) -> Entry | None:
        """The entry at `path` (with slashes, case does not matter); None where there is none."""
        entry = Entry("", is_folder=True, cluster=self._root, size=0)
        for name in path.strip("/").split("/"):
            if not entry.is_folder:
                return None
            found = next((each for each in self.list(entry) if each.name.upper() == name.upper()), None)
            if found is None:
                return None
            entry = found
        return entry

    def list(self, folder: Entry) -> list[Entry]:
        """What a folder holds."""
        if folder.cluster == 0:
            return list(_entries(self._read(self._root_at, self._root_size)))
        return list(_entries(self._content(folder.cluster, _MAX_DIRECTORY)))

    def read(self, entry: Entry, length: int) -> bytes:
        """The first `length` bytes of a file."""
        wanted = min(length, entry.size)
        return self._content(entry.cluster, wanted)[:wanted] if wanted else b""

    def _content(self, cluster: int, limit: int) -> bytes:
        data = bytearray()
        while 2 <= cluster < self._clusters + 2 and len(data) < limit:
            data += self._read(self._data + (cluster - 2) * self._cluster, self._cluster)
            cluster = self._next(cluster)
        return bytes(data)

    def _next(self, cluster: int) -> int:
        """The cluster that follows; a number beyond the last one where the chain ends (or is damaged)."""
        if self._bits == 32:
            return int(struct.unpack("<I", self._read(self._table + cluster * 4, 4))[0]) & 0x0FFFFFFF
        if self._bits == 16:
            return int(struct.unpack("<H", self._read(self._table + cluster * 2, 2))[0])
        pair = int(struct.unpack("<H", self._read(self._table + cluster * 3 // 2, 2))[0])
        return pair >> 4 if cluster & 1 else pair & 0xFFF

    def _read(self, at: int, length: int) -> bytes:
        if at < 0 or at + length > self._size:
            raise FatError("it refers to places outside its partition")
        self._disk.seek(self._start + at)
        data = self._disk.read(length)
        if len(data) < length:
            raise FatError("it is cut short")
        return data


def _entries(table: bytes) -> Iterator[Entry]:
    parts: dict[int, str] = {}
    for at in range(0, len(table) - 31, 32):
        raw = table[at : at + 32]
        if raw[0] == _END:
            return
        attributes = raw[11]
        if raw[0] == _DELETED:
            parts = {}
        elif attributes & 0x3F == _ATTR_LONG:
            text = (raw[1:11] + raw[14:26] + raw[28:32]).decode("utf-16-le", errors="replace")
            parts[raw[0] & 0x1F] = text.partition("\0")[0]
        elif attributes & _ATTR_VOLUME:
            parts = {}
        else:
            long_name = "".join(parts[number] for number in sorted(parts))
            parts = {}
            high, low, size = struct.unpack("<20xH4xHI", raw)
            yield Entry(long_name or _short_name(raw), bool(attributes & _ATTR_FOLDER), high << 16 | low, size)


def _short_name(raw: bytes) -> str:
    stem, extension = raw[:8].decode("cp437").rstrip(), raw[8:11].decode("cp437").rstrip()
    return f"{stem}.{extension}" if extension else stem

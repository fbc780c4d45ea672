"""Disks made by hand, byte by byte: a partition table, an EFI system partition, a loader; and headers of all kinds."""

from __future__ import annotations

import struct
import zlib
from uuid import UUID, uuid4

SECTOR = 512
MiB = 1 << 20
ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
LINUX = "0fc63daf-8483-4772-8e79-3d69d8477de4"
ROOT_ARM = "b921b045-1df0-41c3-af44-4c6f280d3fae"
ROOT_X86 = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"
MACHINES = {"BOOTX64.EFI": 0x8664, "BOOTAA64.EFI": 0xAA64, "BOOTRISCV64.EFI": 0x5064}


def loader(machine: int) -> bytes:
    """The beginning of an EFI program."""
    return (b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0" + struct.pack("<H", machine)).ljust(700, b"\0")


def _short(name: str, attributes: int, cluster: int, size: int) -> bytes:
    stem, _, extension = name.partition(".")
    return struct.pack("<8s3sB8xHHHHI", stem.ljust(8).encode(), extension.ljust(3).encode(), attributes, 0, 0, 0,
                       cluster, size)  # fmt: skip


def _long(name: str) -> bytes:
    """The entries that carry a long name, last part first."""
    parts = [name[at : at + 13] for at in range(0, len(name), 13)]
    rows = []
    for number, part in reversed(list(enumerate(parts, 1))):
        text = part if len(part) == 13 else part + "\0" + "\uffff" * (12 - len(part))
        raw = text.encode("utf-16-le")
        last = 0x40 if number == len(parts) else 0
        rows.append(bytes([number | last]) + raw[:10] + b"\x0f\0\0" + raw[10:22] + b"\0\0" + raw[22:26])
    return b"".join(rows)


def fat16(files: dict[str, bytes], *, size: int = 8 * MiB, folder: str = "BOOT") -> bytes:
    """A FAT16 with these files in EFI/<folder>; every file takes one cluster of 2 KiB."""
    per_cluster, reserved, per_fat, root_entries = 4, 1, 32, 512
    cluster = per_cluster * SECTOR
    data_at = (reserved + per_fat) * SECTOR + root_entries * 32
    disk = bytearray(size)
    struct.pack_into("<3s8sHBHBHHBHHHII", disk, 0, b"\xeb\x3c\x90", b"TEST    ", SECTOR, per_cluster, reserved, 1,
                     root_entries, 0, 0xF8, per_fat, 32, 2, 0, size // SECTOR)  # fmt: skip
    disk[510:512] = b"\x55\xaa"

    def put(number: int, data: bytes) -> None:
        at = data_at + (number - 2) * cluster
        disk[at : at + len(data)] = data
        struct.pack_into("<H", disk, reserved * SECTOR + number * 2, 0xFFFF)

    root_at = (reserved + per_fat) * SECTOR
    table = _short("TESTDISK.", 0x08, 0, 0) + _short("EFI", 0x10, 2, 0)
    disk[root_at : root_at + len(table)] = table
    put(2, _short(folder, 0x10, 3, 0))
    rows = b""
    for number, (name, content) in enumerate(files.items(), 4):
        stem, _, extension = name.partition(".")
        plain = len(stem) <= 8
        rows += (b"" if plain else _long(name)) + _short(name if plain else f"{stem[:6]}~1.{extension}", 0x20, number,
                                                        len(content))
        put(number, content)
    put(3, rows)
    return bytes(disk)


def gpt(partitions: list[tuple[str, bytes]], *, size: int = 16 * MiB) -> bytearray:
    """A disk with these partitions (type, content) one behind another from 1 MiB on."""
    disk = bytearray(size)
    disk[446:462] = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, size // SECTOR - 1)
    disk[510:512] = b"\x55\xaa"
    table, at = bytearray(128 * 128), MiB
    for number, (kind, content) in enumerate(partitions):
        length = max(len(content), MiB)
        disk[at : at + len(content)] = content
        struct.pack_into("<16s16sQQ", table, number * 128, UUID(kind).bytes_le, uuid4().bytes_le, at // SECTOR,
                         (at + length) // SECTOR - 1)  # fmt: skip
        at += length
    last = size // SECTOR - 1
    header = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, 1, last, 34, last - 34,
                         uuid4().bytes_le, 2, 128, 128, zlib.crc32(table))  # fmt: skip
    disk[512:604] = header[:16] + struct.pack("<I", zlib.crc32(header)) + header[20:]
    disk[1024 : 1024 + len(table)] = table
    return disk


def bootable(*names: str, root: str = LINUX) -> bytes:
    """A whole disk that firmware of these loaders' architectures would boot."""
    esp = fat16({name: loader(MACHINES[name]) for name in names})
    return bytes(gpt([(ESP, esp), (root, b"")]))


def qcow2(
    *, version: int = 3, backing: bytes = b"", features: int = 0, crypt: int = 0, cluster_bits: int = 16,
    size: int = 16 * MiB, extensions: list[tuple[int, bytes]] | None = None, length: int = 4 * 65536,
) -> bytes:
    """A qcow2's header (docs/interop/qcow2.txt) in a file of `length` bytes."""
    extra = b"".join(struct.pack(">II", kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0")
                     for kind, data in extensions or []) + bytes(8)
    header_length = 104 if version == 3 else 72
    name_at = header_length + len(extra) if backing else 0
    head = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", version, name_at, len(backing), cluster_bits, size, crypt, 1,
                       3 * 65536, 65536, 1, 0, 0)  # fmt: skip
    if version == 3:
        head += struct.pack(">QQQII", features, 0, 0, 4, 104)
    return (head + extra + backing).ljust(length, b"\0")[:length]

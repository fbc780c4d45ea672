"""A writer for the "newc" cpio archive, the format of an initramfs.

The format is that of the kernel's Documentation/driver-api/early-userspace/buffer-format.rst: per entry an ASCII
header of thirteen 8-digit hexadecimal numbers, the name with its closing NUL, then the data, each padded to 4 bytes.
The output depends on nothing but the entries: no times, no owners, inode numbers counted from 1.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the archive, owned by root. `name` has no leading slash; `mode` includes the file type."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device node."""


def folder(name: str, mode: int = 0o755) -> Entry:
    return Entry(name, stat.S_IFDIR | mode)


def file(name: str, data: bytes, mode: int = 0o644) -> Entry:
    return Entry(name, stat.S_IFREG | mode, data)


def link(name: str, target: str) -> Entry:
    return Entry(name, stat.S_IFLNK | 0o777, target.encode())


def character_device(name: str, major: int, minor: int, mode: int = 0o600) -> Entry:
    return Entry(name, stat.S_IFCHR | mode, device=(major, minor))


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def _record(entry: Entry, inode: int) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    numbers = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    header = _MAGIC + b"".join(b"%08X" % number for number in numbers)
    return _padded(header + name) + _padded(entry.data)


def build_archive(entries: Iterable[Entry]) -> bytes:
    """The archive with `entries` in the order given (a folder before what it holds), trailer included."""
    records = [_record(entry, inode) for inode, entry in enumerate(entries, start=1)]
    return b"".join([*records, _record(Entry(_TRAILER, 0), 0)])

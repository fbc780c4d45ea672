"""Write an empty qcow2 overlay in a millisecond; qemu-img takes 25, twice (QEMU's docs/interop/qcow2.txt, version 3).

For throw-away machines, whose whole start takes half a second. Everything that lasts is made by `qvm.image.disk`.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_PER_L1_ENTRY = _CLUSTER * (_CLUSTER // 8)
_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_LAZY_REFCOUNTS = 1
_BACKING_FORMAT = 0xE2792ACA


def write_overlay(path: Path, *, backing: Path, backing_format: str, size: int) -> None:
    """A new qcow2 (0600) of `size` bytes that reads as `backing`, a file that must stay as it is.

    `size` is at least the backing image's: this is not looked at. Raises FileExistsError, OSError.
    """
    name, kind = os.fsencode(backing), backing_format.encode()
    entries = max(1, -(-size // _PER_L1_ENTRY))
    l1_clusters = -(-entries * 8 // _CLUSTER)
    # One cluster each for header, refcount table and refcount block, then the L1 table, which is all zeros.
    refcount_table, refcount_block, l1_table = _CLUSTER, 2 * _CLUSTER, 3 * _CLUSTER
    extensions = struct.pack(">II", _BACKING_FORMAT, len(kind)) + kind.ljust(-(-len(kind) // 8) * 8, b"\0") + bytes(8)
    header = _HEADER.pack(
        b"QFI\xfb", 3, _HEADER.size + len(extensions), len(name), _CLUSTER_BITS, size, 0, entries, l1_table,
        refcount_table, 1, 0, 0, 0, _LAZY_REFCOUNTS, 0, 4, _HEADER.size,
    )
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, l1_table + l1_clusters * _CLUSTER)
        os.pwrite(fd, header + extensions + name, 0)
        os.pwrite(fd, struct.pack(">Q", refcount_block), refcount_table)
        used = 3 + l1_clusters
        os.pwrite(fd, struct.pack(f">{used}H", *(1,) * used), refcount_block)
    finally:
        os.close(fd)

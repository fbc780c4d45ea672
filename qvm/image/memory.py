"""Whether an image's tree is unpacked in memory: a third less work than on a disk, where there is room."""

from __future__ import annotations

import re
from pathlib import Path

from qvm.units import GiB

TREE = 3 * GiB
"""Bytes that the unpacked root of the largest recipe may grow to; that of debian-13 takes 1.1 GiB."""
SPARE = 1 * GiB
"""Bytes that the build's programs and everybody else keep."""


def choose_tree_bytes(available: int | None, limit: int | None) -> int:
    """Bytes of a tmpfs for the tree, 0 where it had better lie on the disk. Pure.

    `available`: of the host's memory without swapping; `limit`: what our control group may still take, None for all.
    """
    if available is None:
        return 0
    room = available if limit is None else min(available, limit)
    return TREE if room >= TREE + SPARE else 0


def parse_available(meminfo: str) -> int | None:
    """MemAvailable of proc_meminfo(5), in bytes; None on kernels before 3.14."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def group_room(maximum: str, current: str) -> int | None:
    """What memory.max and memory.current of a control group leave, in bytes; None without a limit. Pure."""
    if not maximum.strip().isdigit() or not current.strip().isdigit():
        return None
    return max(0, int(maximum) - int(current))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def available_bytes() -> int | None:
    """Bytes of this host's memory that can be had without swapping; None where it does not tell."""
    return parse_available(_read(Path("/proc/meminfo")))


def tree_bytes() -> int:
    """`choose_tree_bytes` of this host."""
    own = re.search(r"^0::(/.*)$", _read(Path("/proc/self/cgroup")), re.MULTILINE)
    group = Path("/sys/fs/cgroup") / (own[1].lstrip("/") if own else "")
    limit = group_room(_read(group / "memory.max"), _read(group / "memory.current"))
    return choose_tree_bytes(available_bytes(), limit)

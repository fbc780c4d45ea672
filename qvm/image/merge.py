"""Layers that no snapshot needs any more are merged with a neighbour. See `qvm.image.layers` for what layers are.

Either down (the upper's blocks are written into the lower, which takes its place) or up (the upper takes over what it
lacks of the lower). At every moment of either, each chain in use reads as before, so nothing is lost
by an interruption; a layer that another instance shares (a hard link) is never written to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from qvm import paths
from qvm.image.disk import disk_info, qemu_img
from qvm.image.layers import LayeredDisk, chain_of, layers_in, newest, read_header, switch


@dataclass(frozen=True, slots=True)
class Merge:
    lower: Path
    """Goes (up) or takes the upper's place (down)."""
    upper: Path
    down: bool


def plan_merge(disk: LayeredDisk, tops: Iterable[str], *, running: bool = False) -> Merge | None:
    """The next merge that shortens the chain of the disk; None where there is none (any more).

    `tops` are the names of layers that saved states remember. A running machine can only merge up into the layer it
    writes to.
    """
    needed = {disk.folder / name for name in tops}
    chain = chain_of(newest(disk))
    children = _children(disk)
    for upper, lower in itertools.pairwise(chain):
        if lower in needed or len(children.get(lower, [])) != 1:
            continue
        if running:
            if upper == chain[0] and not _shared(upper):
                return Merge(lower, upper, down=False)
        elif not _shared(lower) and not any(_shared(child) for child in children.get(upper, [])):
            return Merge(lower, upper, down=True)
        elif not _shared(upper):
            return Merge(lower, upper, down=False)
    return None


def _children(disk: LayeredDisk) -> dict[Path, list[Path]]:
    found: dict[Path, list[Path]] = {}
    for path in layers_in(disk):
        backing = read_header(path).backing
        if backing is not None and "/" not in backing:
            found.setdefault(disk.folder / backing, []).append(path)
    return found


def _shared(layer: Path) -> bool:
    return layer.stat().st_nlink > 1


def merge(disk: LayeredDisk, work: Merge, *, renamed: Callable[[str, str], None]) -> None:
    """Do it; the machine is off. `renamed(old, new)` is called before the layer `old` goes, for the saved states that
    remember it: from then on `new` holds the same."""
    if not work.down:
        _merge_up(work.lower, work.upper)
        work.lower.unlink()
        return
    qemu_img("commit", "-q", "-d", "-f", "qcow2", work.upper)
    paths.sync(work.lower)
    for child in _children(disk).get(work.upper, []):
        qemu_img("rebase", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", work.lower.name, child)
        paths.sync(child)
    if newest(disk) == work.upper:
        switch(disk, work.lower)  # no state remembers the newest
    else:
        renamed(work.upper.name, work.lower.name)
    work.upper.unlink()


def _merge_up(lower: Path, upper: Path) -> None:
    info = disk_info(lower)
    below = read_header(lower).backing
    words: list[str | Path] = ["rebase", "-q", "-f", "qcow2"]
    words += ["-b", below, "-F", info.backing_format or "qcow2"] if below else ["-b", ""]
    qemu_img(*words, upper)
    paths.sync(upper)


def merge_all(disk: LayeredDisk, tops: Iterable[str], *, renamed: Callable[[str, str], None]) -> int:
    """Every merge that can be made of a machine that is off; returns how many there were."""
    names, count = set(tops), 0
    while (work := plan_merge(disk, names)) is not None:
        merge(disk, work, renamed=renamed)
        if work.down and work.upper.name in names:
            names = (names - {work.upper.name}) | {work.lower.name}
        count += 1
    return count


def make_plain(disk: LayeredDisk) -> bool:
    """Turn a disk of one single layer back into a plain file; True where it is plain now. The machine is off."""
    if not disk.path.is_symlink():
        return True
    current = newest(disk)
    if layers_in(disk) != [current] or chain_of(current) != [current]:
        return False
    current.rename(disk.path)
    paths.sync(disk.path.parent)
    disk.folder.rmdir()
    return True

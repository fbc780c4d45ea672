"""Saved states of an instance: folders that hold RAM, device state and what they fit; whole or not there at all.

    _instances/<profile>/suspended/          what the next start goes on from; used once
    _instances/<profile>/snapshots/<name>/   likewise, but kept
        manifest.json                        written last but `synced`; a folder without one is no state
        ram  dimm-<id>.ram  devices          absent where the machine was off: then only the disks are remembered
        ram.changes ...                      what differs, where RAM is only a link to the file it began with
        synced                               everything above has reached the disk

A state is made in a folder beside its own (`.<name>.partial`) and renamed. Half a gigabyte takes seconds to reach the
disk, which nobody should wait for: `settle` sees to it afterwards, and until `synced` stands there a state counts only
as long as the host has not been booted anew. Disks are not part of the folder: the manifest names layers (see
`qvm.image.layers`), and for the suspended state also size and mtime of the newest, so that a state whose disks have
been written to since is never used.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvm import paths
from qvm.errors import InstanceStateError, UsageError
from qvm.filenames import Files
from qvm.instance.record import read_json, write_json

MANIFEST = "manifest.json"
SYNCED = "synced"
RAM = "ram"
DEVICES = "devices"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def dimm_file(name: str) -> str:
    return f"dimm-{name}.ram"


def changes_file(ram: Path) -> Path:
    """What differs from the RAM file `ram`, where it is not the whole truth; see `qvm.qemu.ramchanges`."""
    return ram.with_name(ram.name + ".changes")


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a machine must be the same for a state to fit it."""

    cpus: int
    memory: int
    """Bytes it was started with."""
    mounts: int
    """9p devices, those that mount nothing included."""
    dimms: tuple[tuple[str, int], ...] = ()
    """Id and size in bytes of memory that was plugged in, in order."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What shows that a disk was written to."""

    size: int
    mtime: int
    """Nanoseconds since the epoch."""


@dataclass(frozen=True, slots=True)
class SavedState:
    name: str
    created: float
    """Seconds since the epoch."""
    host_boot: str
    disks: dict[str, str]
    """Disk ("root", "data") to the name of its layer."""
    shape: Shape | None = None
    """None: the machine was off, there are only disks."""
    machine: str = ""
    """Digest of everything else the state must fit: QEMU's build, the command line."""
    accel: str = ""
    qemu: str = ""
    """Version, for people."""
    streamed: bool = False
    """RAM is part of the device state: whoever saved it could not read QEMU's memory."""
    fresh: bool = False
    """Others may have begun at this state too: the guest needs new entropy before anything else."""
    renewed: bool = False
    """It was another instance's: the guest needs an identity of its own."""
    runtime_version: str = ""
    marks: dict[str, Mark] | None = None
    files: dict[str, int] | None = None
    """File name to size in bytes."""


def check_state_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise UsageError(f"{name!r} cannot name a snapshot: use 1 to 64 of A-Z, a-z, 0-9, '-', '_' and '.', with a "
                         "letter or digit first")


def begin_state(folder: Path) -> Path:
    """An empty folder to make the state of `folder` in; what an interrupted one left is cleared away."""
    partial = _partial(folder)
    shutil.rmtree(partial, ignore_errors=True)
    paths.ensure_private_dir(folder.parent)
    return paths.ensure_private_dir(partial)


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def abandon_state(folder: Path) -> None:
    shutil.rmtree(_partial(folder), ignore_errors=True)


def seal_state(folder: Path, state: SavedState) -> None:
    """The files in `begin_state`'s folder are the state now, which takes the place of any older one."""
    partial = _partial(folder)
    files = {entry.name: entry.stat().st_size for entry in partial.iterdir() if entry.is_file()}
    write_json(partial / MANIFEST, _to_dict(state) | {"files": files})
    discard_state(folder)
    partial.rename(folder)
    paths.sync(folder.parent)


def rewrite_state(folder: Path, state: SavedState) -> None:
    """Change what the manifest says, not the files; atomic."""
    write_json(folder / MANIFEST, _to_dict(state) | {"files": state.files or {}})


def load_state(folder: Path) -> SavedState:
    """InstanceStateError where there is none or it cannot be read."""
    data = read_json(folder / MANIFEST)
    if data is None:
        raise InstanceStateError(f"there is no saved state in {folder}")
    try:
        return _from_dict(data)
    except (KeyError, TypeError, ValueError) as error:
        raise InstanceStateError(f"the saved state in {folder} is damaged: {error!r}") from error


def find_state(folder: Path) -> SavedState | None:
    return load_state(folder) if (folder / MANIFEST).exists() else None


def find_flaw(
    folder: Path, state: SavedState, *, host_boot: str, disks: Mapping[str, Path] | None = None
) -> str | None:
    """Why the state must not be used; None where it is whole. `disks`: also those must be as it left them."""
    for name, size in (state.files or {}).items():
        try:
            if (folder / name).stat().st_size != size:
                return f"its file {name} is cut short"
        except FileNotFoundError:
            return f"its file {name} is missing"
    if not (folder / SYNCED).exists() and state.host_boot != host_boot:
        return "the host went down before all of it had reached the disk"
    for name, path in (disks or {}).items():
        if path.name != state.disks.get(name) or take_mark(path) != (state.marks or {}).get(name):
            return f"the {name} disk has been used since"
    return None


def take_mark(path: Path) -> Mark:
    stat = path.stat()
    return Mark(stat.st_size, stat.st_mtime_ns)


def consume_state(folder: Path) -> None:
    """From here on the state does not exist, even after a power loss; its files stay until `discard_state`."""
    (folder / MANIFEST).unlink(missing_ok=True)
    paths.sync(folder)


def keep_memory(folder: Path) -> None:
    """Leave of a state that was consumed the RAM files alone: the machine that has them mapped may be saved again, and
    then they are linked, which a file without a name could not be."""
    for entry in folder.iterdir():
        if entry.name != RAM and not entry.name.endswith(f".{RAM}"):
            entry.unlink()


def discard_remains(folder: Path) -> None:
    """Remove what is no state (any more), and nothing that somebody else puts in its place meanwhile."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        names = os.listdir(fd)  # noqa: PTH208  (of a folder that may have another name by now)
        if MANIFEST in names:
            return
        for name in names:
            os.unlink(name, dir_fd=fd)
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):  # somebody else is at it
            raise
    finally:
        os.close(fd)


def discard_state(folder: Path) -> None:
    """Remove a state; a machine that has mapped its RAM keeps it. Interrupted, it leaves no state."""
    if folder.is_dir():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def borrow_state(source: Path, into: Path) -> None:
    """Hard links of a state's files in the folder `begin_state` made; RAM and device state are never written to."""
    for entry in source.iterdir():
        if entry.name not in (MANIFEST, SYNCED) and entry.is_file():
            os.link(entry, _partial(into) / entry.name)


def mark_synced(folder: Path) -> None:
    (folder / SYNCED).touch()
    paths.sync(folder)


def is_synced(folder: Path) -> bool:
    return (folder / SYNCED).exists()


def list_snapshots(profile: str) -> list[SavedState]:
    """Whole or not, oldest first; a damaged one is left out."""
    folder = Files(profile).snapshots
    if not folder.is_dir():
        return []
    found = []
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        try:
            state = find_state(entry)
        except InstanceStateError:
            continue
        if state is not None:
            found.append(state)
    return sorted(found, key=lambda state: state.created)


def state_size(folder: Path) -> int:
    """Bytes on disk; RAM that is only linked counts for whoever made it."""
    files = [entry for entry in folder.iterdir() if entry.is_file() and not changes_file(entry).exists()]
    return sum(entry.stat().st_blocks * 512 for entry in files)


def used_layers(profile: str, disk: str) -> list[str]:
    """Names of the layers of `disk` ("root", "data") that saved states remember."""
    suspended = find_state(Files(profile).suspended)
    states = [*list_snapshots(profile), *([suspended] if suspended else [])]
    return [state.disks[disk] for state in states if disk in state.disks]


def rename_layer(profile: str, disk: str, old: str, new: str) -> None:
    """Layer `new` has taken the place of `old`."""
    for state in list_snapshots(profile):
        if state.disks.get(disk) == old:
            manifest = Files(profile).snapshots / state.name / MANIFEST
            data = read_json(manifest)
            assert data is not None, "it was read a moment ago"
            write_json(manifest, data | {"disks": data["disks"] | {disk: new}})


def _to_dict(state: SavedState) -> dict[str, Any]:
    shape = state.shape
    return {
        "version": 1, "name": state.name, "created": state.created, "host_boot": state.host_boot,
        "disks": state.disks, "machine": state.machine, "accel": state.accel, "qemu": state.qemu,
        "streamed": state.streamed, "fresh": state.fresh, "renewed": state.renewed,
        "runtime_version": state.runtime_version,
        "shape": None if shape is None else {
            "cpus": shape.cpus, "memory": shape.memory, "mounts": shape.mounts,
            "dimms": [list(dimm) for dimm in shape.dimms],
        },
        "marks": None if state.marks is None else {
            name: [mark.size, mark.mtime] for name, mark in state.marks.items()
        },
    }  # fmt: skip


def _from_dict(data: dict[str, Any]) -> SavedState:
    shape = data["shape"]
    return SavedState(
        name=str(data["name"]), created=float(data["created"]), host_boot=str(data["host_boot"]),
        disks={str(key): str(value) for key, value in data["disks"].items()},
        shape=None if shape is None else Shape(
            int(shape["cpus"]), int(shape["memory"]), int(shape["mounts"]),
            tuple((str(name), int(size)) for name, size in shape["dimms"]),
        ),
        machine=str(data["machine"]), accel=str(data["accel"]), qemu=str(data["qemu"]),
        streamed=bool(data["streamed"]), fresh=bool(data["fresh"]), renewed=bool(data["renewed"]),
        runtime_version=str(data["runtime_version"]),
        marks=None if data["marks"] is None else {
            name: Mark(int(size), int(mtime)) for name, (size, mtime) in data["marks"].items()
        },
        files={str(name): int(size) for name, size in data["files"].items()},
    )  # fmt: skip

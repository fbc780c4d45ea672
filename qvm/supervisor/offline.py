"""Snapshots and copies of an instance that does not run; the caller holds its lock."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from qvm import paths
from qvm.errors import InstanceStateError
from qvm.filenames import Files
from qvm.image.layers import (
    LayeredDisk,
    add_layer,
    chain_of,
    data_disk,
    frozen_name,
    link_chain,
    newest,
    put_back,
    read_header,
    remove_unused,
    root_disk,
    switch,
)
from qvm.image.merge import make_plain, merge_all
from qvm.instance import states
from qvm.instance.record import read_json, write_json
from qvm.instance.states import SavedState
from qvm.qemu.hostinfo import read_boot_id
from qvm.warm.store import pin_below


def disks_of(files: Files) -> dict[str, LayeredDisk]:
    return {"root": root_disk(files), "data": data_disk(files)}


def refuse_unborn(profile: str) -> None:
    """InstanceStateError for an instance whose first start was interrupted: its disks are none of its own yet."""
    if Files(profile).fork_plan.exists():
        raise InstanceStateError(f"{profile!r} has never run", hint=f"`qvm start {profile}` first")


def freeze_disks(files: Files) -> dict[str, str]:
    """What the disks hold now becomes layers that are not written to any more; returns their names."""
    tops: dict[str, str] = {}
    for name, disk in disks_of(files).items():
        top = frozen_name(disk)
        switch(disk, add_layer(disk, top))
        tops[name] = top.name
    return tops


def snapshot_stopped(profile: str, name: str) -> SavedState:
    """A snapshot of the disks, and of the suspended state where there is one, which stays usable."""
    refuse_unborn(profile)
    files = Files(profile)
    suspended = states.find_state(files.suspended)
    tops = freeze_disks(files)
    folder = files.snapshots / name
    states.begin_state(folder)
    if suspended is None:
        state = SavedState(name, time.time(), read_boot_id(), tops)
    else:
        states.borrow_state(files.suspended, folder)
        state = replace(suspended, name=name, created=time.time(), disks=tops, marks=None)
        _point_at_new_layers(files, replace(suspended, fresh=True))
    states.seal_state(folder, state)
    if suspended is None or states.is_synced(files.suspended):
        states.mark_synced(folder)
    return state


def _point_at_new_layers(files: Files, state: SavedState) -> None:
    """The suspended state goes on with empty layers on top of what it knows, which read the same."""
    disks = {name: newest(disk) for name, disk in disks_of(files).items()}
    states.rewrite_state(files.suspended, replace(
        state, disks={name: path.name for name, path in disks.items()},
        marks={name: states.take_mark(path) for name, path in disks.items()},
    ))  # fmt: skip


def restore(profile: str, name: str) -> SavedState:
    """Put the disks back to a snapshot; where it has a machine's memory, the next start goes on from there.

    What was written since is gone. Interrupted, it is completed by `finish_restore`.
    """
    files = Files(profile)
    state = states.load_state(files.snapshots / name)
    write_json(files.restore_plan, {"version": 1, "snapshot": name})
    states.discard_state(files.suspended)
    for disk_name, disk in disks_of(files).items():
        put_back(disk, state.disks[disk_name])
    if state.shape is not None:
        states.begin_state(files.suspended)
        states.borrow_state(files.snapshots / name, files.suspended)
        disks = {disk_name: newest(disk) for disk_name, disk in disks_of(files).items()}
        states.seal_state(files.suspended, replace(
            state, name="suspended", fresh=True, disks={key: path.name for key, path in disks.items()},
            marks={key: states.take_mark(path) for key, path in disks.items()},
        ))  # fmt: skip
        if states.is_synced(files.snapshots / name):
            states.mark_synced(files.suspended)
    for disk_name, disk in disks_of(files).items():
        remove_unused(disk, states.used_layers(profile, disk_name))
    files.restore_plan.unlink()
    return state


def finish_restore(profile: str) -> str | None:
    """Complete a restore that was interrupted; returns the snapshot's name where there was one."""
    files = Files(profile)
    plan = read_json(files.restore_plan)
    if plan is None:
        return None
    name = str(plan["snapshot"])
    if states.find_state(files.snapshots / name) is None:
        raise InstanceStateError(f"the snapshot {name!r}, which was being restored, is gone",
                                 hint=f"restore another one: `qvm snapshot list {profile}`")
    restore(profile, name)
    return name


def tidy_stopped(profile: str) -> int:
    """Remove and merge the layers that no saved state needs; returns how many were merged."""
    files, count = Files(profile), 0
    if states.find_state(files.suspended) is not None:
        return 0  # its disks stay to the byte as it left them
    for name, disk in disks_of(files).items():
        if disk.path.exists():
            remove_unused(disk, states.used_layers(profile, name))
            count += merge_all(disk, states.used_layers(profile, name),
                               renamed=partial(states.rename_layer, profile, name))  # fmt: skip
            make_plain(disk)
    return count


def flatten_data(profile: str) -> None:
    """Leave the data disk of a deleted instance as one file where it shares nothing, and whole in any case."""
    disk = data_disk(Files(profile))
    if disk.path.exists():
        remove_unused(disk, ())
        merge_all(disk, (), renamed=lambda old, new: None)
        make_plain(disk)


def copy_disks(source: str, target: str, tops: dict[str, str]) -> None:
    """Give `target` disks that begin with the layers `tops` of `source`; nothing is copied."""
    files, into = Files(source), Files(target)
    paths.ensure_private_dir(paths.data_dir())
    for name, disk in disks_of(files).items():
        top = disk.folder / tops[name]
        link_chain(top, disks_of(into)[name])
        bottom = read_header(chain_of(top)[-1]).backing
        if bottom is not None:
            pin_below(Path(bottom), into.root_disk)


def copy_state(folder: Path, target: str, state: SavedState) -> None:
    """Have `target`, whose disks are there, go on from the state in `folder`."""
    files = Files(target)
    states.begin_state(files.suspended)
    states.borrow_state(folder, files.suspended)
    states.seal_state(files.suspended, state)
    if states.is_synced(folder):
        states.mark_synced(files.suspended)
    adopt_state(target, states.load_state(files.suspended))


def forget(profile: str, name: str) -> int:
    """Remove a snapshot and what only it needed; returns how many layers were merged."""
    states.discard_state(Files(profile).snapshots / name)
    return tidy_stopped(profile)


def adopt_state(target: str, state: SavedState) -> None:
    """The state that lies in `target`'s folder is for `target` to go on from, as an instance of its own."""
    files = Files(target)
    disks = {name: newest(disk) for name, disk in disks_of(files).items()}
    states.rewrite_state(files.suspended, replace(
        state, name="suspended", renewed=True, disks={name: path.name for name, path in disks.items()},
        marks={name: states.take_mark(path) for name, path in disks.items()},
    ))  # fmt: skip

"""`qvm snapshot`: moments of an instance to go back to, disks and memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from qvm.commands.results import SnapshotResult
from qvm.commands.start import start_locked
from qvm.commands.stop import stop_locked
from qvm.commands.suspend import tell_streamed
from qvm.errors import InstanceStateError, NoSuchInstanceError
from qvm.filenames import Files
from qvm.instance.states import SavedState, check_state_name, find_state, list_snapshots, state_size
from qvm.instance.store import find_run, load_record, lock_instance
from qvm.progress import Progress
from qvm.supervisor import offline
from qvm.supervisor.client import call
from qvm.supervisor.launch import have_ready
from qvm.supervisor.prelaunch import Prelaunched


def create(profile: str, name: str, *, progress: Progress) -> SnapshotResult:
    """Remember this moment of the instance as `name`: of a running one its memory too, of another its disks."""
    check_state_name(name)
    load_record(profile)
    began = time.monotonic()
    with lock_instance(profile, on_wait=progress.note):
        offline.finish_restore(profile)
        folder = Files(profile).snapshots / name
        if find_state(folder) is not None:
            raise InstanceStateError(f"{profile!r} has a snapshot {name!r} already",
                                     hint=f"`qvm snapshot delete {profile} {name}` removes it")
        if find_run(profile) is None:
            state = offline.snapshot_stopped(profile, name)
            return SnapshotResult(profile, name, "create", time.monotonic() - began, state.shape is not None)
        with progress.step(f"saving {profile}"):
            have_ready(profile)
            report = call(Files(profile).control_socket, "snapshot", timeout=None, name=name)
        notes = tell_streamed(report, progress)
    return SnapshotResult(profile, name, "create", time.monotonic() - began, True, float(report["paused"]),
                          report["timings"], notes)  # fmt: skip


def restore(
    profile: str, name: str, *, progress: Progress, waiting: Prelaunched | None = None
) -> SnapshotResult:
    """Be again what the snapshot remembers. What is now, and is in no snapshot, is lost.

    An instance that ran then runs afterwards; one that was off then is off.
    """
    load_record(profile)
    began = time.monotonic()
    notes: list[str] = []
    with waiting or Prelaunched() as waiting, lock_instance(profile, on_wait=progress.note):
        _require(profile, name)
        # Nothing of this run is kept, so nobody has to be asked.
        stop_locked(profile, force=True, progress=progress)
        state = offline.restore(profile, name)
        if state.shape is not None:
            result = start_locked(profile, {}, cwd=Path.cwd(), progress=progress, began=began, waiting=waiting)
            notes = result.notes
    return SnapshotResult(profile, name, "restore", time.monotonic() - began, state.shape is not None, notes=notes)


def delete(profile: str, name: str, *, progress: Progress) -> SnapshotResult:
    """Forget a snapshot; layers of the disks that only it needed are merged, while the instance runs if it does."""
    load_record(profile)
    began = time.monotonic()
    with lock_instance(profile, on_wait=progress.note):
        state = _require(profile, name)
        if find_run(profile) is not None:
            have_ready(profile)
            call(Files(profile).control_socket, "forget", timeout=None, name=name)
        else:
            with progress.step("tidying the disks"):
                offline.forget(profile, name)
    return SnapshotResult(profile, name, "delete", time.monotonic() - began, state.shape is not None)


def list_all(profile: str) -> list[dict[str, Any]]:
    """Oldest first; sizes in bytes on disk (without the disks' layers), times in seconds since the epoch."""
    load_record(profile)
    return [_describe(profile, state) for state in list_snapshots(profile)]


def _describe(profile: str, state: SavedState) -> dict[str, Any]:
    folder = Files(profile).snapshots / state.name
    return {
        "name": state.name, "created": state.created, "running": state.shape is not None, "size": state_size(folder),
        "cpus": state.shape.cpus if state.shape else None,
        "memory": state.shape.memory + sum(size for _, size in state.shape.dimms) if state.shape else None,
        "disks": state.disks, "folder": str(folder),
    }  # fmt: skip


def _require(profile: str, name: str) -> SavedState:
    check_state_name(name)
    state = find_state(Files(profile).snapshots / name)
    if state is None:
        known = ", ".join(state.name for state in list_snapshots(profile))
        raise NoSuchInstanceError(f"{profile!r} has no snapshot {name!r}",
                                  hint=f"there are: {known}" if known else "it has none")
    return state

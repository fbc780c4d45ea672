"""The instances on this host: list, load, lock, and which of them run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager

from qvm import paths
from qvm.errors import InstanceStateError, NoSuchInstanceError
from qvm.filenames import Files
from qvm.instance.record import Record, Run, read_json, write_json
from qvm.locks import lock
from qvm.process import is_alive


def list_profiles() -> list[str]:
    """Names of all instances, sorted."""
    folder = paths.instances_dir()
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / Files(entry.name).record.name).is_file())


def find_record(profile: str) -> Record | None:
    """The definition of an instance; None where there is none; InstanceStateError where it is damaged."""
    data = read_json(Files(profile).record)
    if data is None:
        return None
    try:
        return Record.from_dict(data)
    except (KeyError, TypeError, ValueError) as error:
        raise InstanceStateError(
            f"the record of {profile!r} is damaged: {error!r}",
            hint=f"`qvm delete {profile} -f` removes the instance; its data disk stays",
        ) from error


def load_record(profile: str) -> Record:
    """Like `find_record`, but NoSuchInstanceError (naming what there is) where there is none."""
    record = find_record(profile)
    if record is None:
        known = list_profiles()
        raise NoSuchInstanceError(
            f"there is no instance {profile!r}",
            hint=f"there are: {', '.join(known)}" if known else f"`qvm start {profile}` makes it",
        )
    return record


def save_record(record: Record) -> None:
    files = Files(record.config.profile)
    paths.ensure_private_dir(files.folder)
    write_json(files.record, record.to_dict())


def find_run(profile: str) -> Run | None:
    """The live QEMU process of an instance; None where there is none, whatever stale files say."""
    run = load_run(profile)
    return run if run is not None and is_alive(run.qemu) else None


def load_run(profile: str) -> Run | None:
    """What `run.json` says, true or stale; None where it is missing or unreadable (then nothing can be adopted)."""
    try:
        data = read_json(Files(profile).run)
        return None if data is None else Run.from_dict(data)
    except (InstanceStateError, KeyError, TypeError, ValueError):
        return None


def save_run(profile: str, run: Run) -> None:
    write_json(Files(profile).run, run.to_dict())


def clear_run(profile: str) -> None:
    """Forget a QEMU process that has gone, and the sockets it left; the supervisor's own socket is its own."""
    files = Files(profile)
    for path in (files.run, files.monitor_socket, files.agent_socket, files.stream_socket):
        path.unlink(missing_ok=True)


def lock_instance(
    profile: str, *, timeout: float | None = None, on_wait: Callable[[str], None] | None = None
) -> AbstractContextManager[None]:
    """Hold the instance: start, stop and delete of one profile exclude each other. See `qvm.locks.lock`."""
    return lock(Files(profile).lock, what=f"the instance {profile!r}", timeout=timeout, on_wait=on_wait)


def remove_instance(profile: str, *, data: bool) -> tuple[list[str], list[str]]:
    """Delete an instance's files, with its data disk when `data`; returns (removed, kept) paths.

    The profile file stays: it is the user's, and the next start of that name uses it again.
    """
    files = Files(profile)
    removed: list[str] = []
    kept: list[str] = []
    if files.folder.exists():
        shutil.rmtree(files.folder)
        removed.append(str(files.folder))
    if files.data_disk.exists():
        if data:
            files.data_disk.unlink()
            shutil.rmtree(files.data_layers, ignore_errors=True)
            removed.append(str(files.data_disk))
        else:
            kept.append(str(files.data_disk))
    if files.config.exists():
        if data:
            files.config.unlink()
            removed.append(str(files.config))
        else:
            kept.append(str(files.config))
    folder = files.profile_folder
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    return removed, kept

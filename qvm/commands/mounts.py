"""`qvm mounts`: what is mounted, and folders added and removed while the VM runs (or for its next start)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from qvm.config.context import Context, RejectedError
from qvm.config.kinds import Mounts
from qvm.config.model import Mount
from qvm.config.save import save_setting
from qvm.config.validate import validate_mounts
from qvm.errors import ConfigError, InstanceStateError, UsageError
from qvm.filenames import Files
from qvm.instance.record import Record
from qvm.instance.store import find_run, load_record, lock_instance, save_record
from qvm.supervisor.client import NoSupervisorError, call

CHANGE_TIMEOUT = 120.0
"""Seconds; mounting takes milliseconds, an emulated guest that is busy may take much longer to unplug a device."""


@dataclass(frozen=True, slots=True)
class MountsResult:
    profile: str
    mounts: list[dict[str, Any]]
    """source, target, writable, type, state (mounted, broken, waiting) and reason."""
    notes: list[str]


def mounts(profile: str) -> MountsResult:
    record = load_record(profile)
    try:
        answer = call(Files(profile).control_socket, "mounts")
    except NoSupervisorError:
        return MountsResult(profile, _waiting(record, f"{profile} does not run"), [])
    return MountsResult(profile, list(answer["mounts"]), [])


def add_mounts(
    profile: str, wishes: Sequence[str | Mapping[str, Any]], *, save: bool = True, cwd: Path
) -> MountsResult:
    """Mount folders, written as after `--mount`. In the running VM, in the record and, with `save`, in the profile.

    ConfigError for what is wrong with them. What is mounted at the same place already must be removed first.
    """
    context = Context(profile, cwd, os.environ)
    try:
        new = Mounts().parse(list(wishes), context)
    except RejectedError as error:
        raise ConfigError([problem.text for problem in error.problems], hint="qvm mounts add ~/src:/src") from error

    def change(now: tuple[Mount, ...]) -> tuple[Mount, ...]:
        wanted = (*now, *(mount for mount in new if mount not in now))
        # Of what is mounted already nothing is asked: a source that has gone is no reason not to add another.
        known = {mount.target: mount.source for mount in now}
        problems = [problem.text for problem in validate_mounts([each for each in new if each not in now], context)]
        problems += [f"{mount.target} is the target of {known[mount.target]} already" for mount in new
                     if mount.target in known and mount not in now]
        if problems:
            raise ConfigError(problems)
        return wanted

    return _change(profile, change, save=save, lazy=False)


def remove_mounts(
    profile: str, names: Sequence[str], *, save: bool = True, force: bool = False, cwd: Path
) -> MountsResult:
    """Unmount folders, each named by its target in the VM, by its source, or by SRC:DST. UsageError for others.

    InstanceStateError where something in the VM uses one, unless `force`, which takes it out of sight at once.
    """
    def change(now: tuple[Mount, ...]) -> tuple[Mount, ...]:
        gone = [_find(now, name, cwd) for name in names]
        return tuple(mount for mount in now if mount not in gone)

    return _change(profile, change, save=save, lazy=force)


def _find(now: Sequence[Mount], name: str, cwd: Path) -> Mount:
    bare = name.removesuffix(":mmap").removesuffix(":ro").removesuffix(":rw").removesuffix(":w")
    source, _, target = bare.partition(":")
    try:
        path = Path(os.path.normpath(cwd / Path(source).expanduser()))  # as the mount's own source was made
    except RuntimeError as error:  # ~nobody
        raise UsageError(f"{name}: {error}") from error
    found = [
        *(mount for mount in now if mount.target == PurePosixPath(name)),
        *(mount for mount in now if mount.source == path and (not target or mount.target == PurePosixPath(target))),
    ]
    if found and (found[0].target == PurePosixPath(name) or len(found) == 1):
        return found[0]
    if found:
        raise UsageError(f"{name} is mounted more than once",
                         hint=f"name the place: {', '.join(str(mount.target) for mount in found)}")
    there = ", ".join(str(mount.target) for mount in now)
    raise UsageError(f"nothing is mounted at {name}", hint=f"there are: {there}" if there else "there are no mounts")


def _change(profile: str, change: Any, *, save: bool, lazy: bool) -> MountsResult:
    with lock_instance(profile):
        record = load_record(profile)
        wanted: tuple[Mount, ...] = change(record.config.mounts)
        record = replace(record, config=replace(record.config, mounts=wanted))
        notes: list[str] = []
        rows = _waiting(record, f"{profile} does not run")
        if find_run(profile) is not None:
            try:
                answer = call(Files(profile).control_socket, "mounts", timeout=CHANGE_TIMEOUT,
                              wanted=[mount.to_dict() for mount in wanted], lazy=lazy)
            except NoSupervisorError as error:
                raise InstanceStateError(f"{profile!r} runs without a supervisor",
                                         hint=f"`qvm start {profile}` gives it one") from error
            rows, notes = list(answer["mounts"]), list(answer["notes"])
        save_record(record)
        if save:
            notes += save_setting(profile, "mounts", wanted)
    return MountsResult(profile, rows, notes)


def _waiting(record: Record, reason: str) -> list[dict[str, Any]]:
    return [{**mount.to_dict(), "type": "", "state": "waiting", "reason": reason} for mount in record.config.mounts]

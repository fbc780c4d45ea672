"""`qvm start`: from wish to running instance; also what `restart` and the Python API use."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvm.commands.prepare import prepare
from qvm.commands.results import StartResult
from qvm.commands.ssh_include import settle_ssh_config
from qvm.commands.status import status
from qvm.commands.stop import stop_locked
from qvm.commands.suspended import check_suspended
from qvm.commands.switching import switch_runtime
from qvm.commands.update import describe_newer_image
from qvm.config.resolve import Resolved, describe_changes, resolve_config
from qvm.config.save import save_profile
from qvm.config.validate import validate_profile_name
from qvm.errors import ConfigError, QvmError
from qvm.instance.record import Record, config_to_dict
from qvm.instance.store import clear_run, find_record, find_run, lock_instance
from qvm.progress import Progress
from qvm.supervisor.client import Event
from qvm.supervisor.launch import ensure_supervisor, wait_settled, wait_supervisor_gone, watch_until_ready
from qvm.supervisor.prelaunch import Prelaunched


def start(
    profile: str,
    flags: Mapping[str, Any],
    *,
    cwd: Path,
    cold: bool = False,
    progress: Progress,
    waiting: Prelaunched | None = None,
) -> StartResult:
    """Create or start the instance `profile` and wait until every requirement holds.

    `flags` maps Config field names to values the user gave. A running instance is left as it is; differences from
    what was asked are named in the notes. `cold` boots a new instance instead of forking a warm image. `waiting`: a
    supervisor's process that the caller has begun.
    """
    check_name(profile)
    began = time.monotonic()
    with lock_instance(profile, on_wait=progress.note):
        return start_locked(profile, flags, cwd=cwd, cold=cold, progress=progress, began=began, waiting=waiting)


def start_locked(
    profile: str, flags: Mapping[str, Any], *, cwd: Path, cold: bool = False, progress: Progress, began: float,
    waiting: Prelaunched | None = None,
) -> StartResult:
    """`start` for a caller that holds the instance's lock, and may have begun to load a supervisor."""
    record = find_record(profile)
    resolved = resolve_config(
        profile, flags, stored=None if record is None else config_to_dict(record.config), cwd=cwd
    )
    if record is not None:
        wait_settled(profile)
    if record is not None and find_run(profile) is not None:
        return _join_running(record, resolved, progress=progress, began=began)
    for note in resolved.notes:
        progress.note(note)
    clear_run(profile)
    if record is not None:
        check_suspended(record, resolved.config, cold=cold, progress=progress)
    with waiting or Prelaunched() as supervisor:
        if record is not None:
            switch_runtime(record, resolved.config, progress=progress)
        prepared = prepare(resolved.config, record, cold=cold, progress=progress)
        for note in (*save_profile(resolved), *settle_ssh_config(wanted=resolved.config.ssh_config)):
            progress.note(note)
        _boot(profile, waiting=supervisor, progress=progress)
    notes = [*resolved.notes, *prepared.notes]
    if record is not None and (offer := describe_newer_image(record)) is not None:
        progress.note(offer)
        notes.append(offer)
    return StartResult(profile, True, status(profile), notes, time.monotonic() - began)


def _join_running(record: Record, resolved: Resolved, *, progress: Progress, began: float) -> StartResult:
    """A start of what runs already: mend its supervisor if need be, change nothing, name what differs."""
    profile = record.config.profile
    notes = [f"{profile!r} runs already"]
    if differing := describe_changes(record.config, resolved.config):
        notes.append(f"not changed while it runs: {', '.join(differing)}; `qvm restart {profile}` with the same "
                     "flags applies it")
    for note in notes:
        progress.note(note)
    _boot(profile, progress=progress, quiet=True)
    return StartResult(profile, False, status(profile), notes, time.monotonic() - began)


def _boot(
    profile: str, *, waiting: Prelaunched | None = None, progress: Progress, quiet: bool = False
) -> None:
    """Have a supervisor, follow it until ready; an interrupt stops what was begun."""
    try:
        ensure_supervisor(profile, waiting=waiting)
        follow = _Follower(progress, quiet=quiet)
        watch_until_ready(profile, follow.see)
    except KeyboardInterrupt:
        if not quiet:
            progress.note("interrupted: stopping the VM")
            stop_locked(profile, force=True, progress=progress)
        raise
    except QvmError:
        wait_supervisor_gone(profile)
        raise


class _Follower:
    """Turns the supervisor's events into progress lines."""

    def __init__(self, progress: Progress, *, quiet: bool) -> None:
        self._progress = progress
        self._quiet = quiet

    def see(self, event: Event) -> None:
        if event["event"] == "note":
            self._progress.note(str(event["text"]))
        elif event["event"] == "requirement" and not self._quiet:
            self._progress.milestone(str(event["name"]), str(event["state"]), float(event.get("seconds", 0.0)))


def check_name(profile: str) -> None:
    problems = validate_profile_name(profile)
    if problems:
        raise ConfigError(problems)

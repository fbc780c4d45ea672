"""`qvm stop`: graceful, then forced at deadlines; works with a dead supervisor too."""

from __future__ import annotations

import time

from qvm.commands.results import StopResult
from qvm.filenames import Files
from qvm.instance.store import clear_run, find_record, find_run, load_record, lock_instance
from qvm.progress import Progress
from qvm.supervisor.client import NoSupervisorError, call
from qvm.supervisor.launch import end_stuck_supervisor, ensure_supervisor, find_status, wait_supervisor_gone


def stop(profile: str, *, force: bool = False, progress: Progress) -> StopResult:
    """Stop the instance; one that does not run is left as it is. NoSuchInstanceError where there is none."""
    load_record(profile)
    if force:
        # A start in progress holds the lock; -f must not wait for it: the supervisor ends it, the start then fails.
        return stop_locked(profile, force=True, progress=progress)
    with lock_instance(profile, on_wait=progress.note):
        return stop_locked(profile, force=force, progress=progress)


def stop_locked(profile: str, *, force: bool, progress: Progress) -> StopResult:
    """`stop` for a caller that holds the instance's lock."""
    began = time.monotonic()
    if find_run(profile) is None and find_status(profile) is None:
        end_stuck_supervisor(profile)
        clear_run(profile)
        restore_host(profile)
        return StopResult(profile, False, "was not running", time.monotonic() - began)
    with progress.step(f"stopping {profile}"):
        how = _ask_supervisor(profile, force=force)
    return StopResult(profile, True, how, time.monotonic() - began)


def _ask_supervisor(profile: str, *, force: bool) -> str:
    """Have the supervisor stop the machine; a dead one is replaced, which adopts QEMU and restores the host."""
    socket = Files(profile).control_socket
    try:
        how = str(call(socket, "stop", force=force, timeout=None)["how"])
    except NoSupervisorError:
        ensure_supervisor(profile)
        how = str(call(socket, "stop", force=force, timeout=None)["how"])
    wait_supervisor_gone(profile)
    return how


def restore_host(profile: str) -> None:
    """Undo what a killed supervisor could not: a docker context that still points at this instance."""
    record = find_record(profile)
    if record is None:
        return
    from qvm.runtime.stack import load_stack
    from qvm.supervisor.context import runtime_context

    runtime = load_stack(record.config)
    runtime.deactivate(runtime_context(record), remove=False)

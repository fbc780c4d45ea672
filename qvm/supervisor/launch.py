"""Start a supervisor, or find the one that runs: the door the commands use."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qvm.errors import DeadlineError, HostError, QvmError, error_from_dict
from qvm.filenames import Files
from qvm.instance.store import find_run
from qvm.logtail import tail_of
from qvm.process import Identity, identify, kill, spawn_detached, wait_gone
from qvm.supervisor.client import Event, NoSupervisorError, call
from qvm.wait import Deadline, backoff, wait_until

if TYPE_CHECKING:
    from qvm.supervisor.prelaunch import Prelaunched

LAUNCH_TIMEOUT = 30.0
STATUS_TIMEOUT = 3.0
GOODBYE_TIMEOUT = 5.0


def find_status(profile: str) -> dict[str, Any] | None:
    """The running supervisor's own status; None where none answers."""
    try:
        return call(Files(profile).control_socket, "status", timeout=STATUS_TIMEOUT)
    except NoSupervisorError:
        return None


def ensure_supervisor(profile: str, *, waiting: Prelaunched | None = None) -> None:
    """Have a supervisor answer for `profile`: it boots the instance, or adopts the QEMU that runs.

    One that holds its lock but does not answer is stuck; it is ended first (QEMU lives on). `waiting`: a process to
    use instead of a new one.
    """
    files = Files(profile)
    if find_status(profile) is not None:
        return
    end_stuck_supervisor(profile)
    child = waiting.go(profile) if waiting is not None else None
    if child is None:
        child = spawn_detached([sys.executable, "-m", "qvm.supervisor", profile], log=files.supervisor_log)

    def answers() -> bool:
        if find_status(profile) is not None:
            return True
        if child.poll() is not None:
            raise QvmError("the supervisor ended at once", hint="see `qvm logs supervisor`",
                           details=tail_of(files.supervisor_log) or None, log_path=files.supervisor_log)
        return False

    try:
        wait_until(answers, Deadline(LAUNCH_TIMEOUT, "the supervisor's start"))
    except DeadlineError as error:
        raise QvmError("the supervisor does not answer", hint="see `qvm logs supervisor`",
                       details=tail_of(files.supervisor_log) or None, log_path=files.supervisor_log) from error


def watch_until_ready(profile: str, on_event: Callable[[Event], None]) -> None:
    """Follow the start; returns when the instance is ready, raises what made it fail."""
    outcome: list[Event] = []

    def see(event: Event) -> None:
        on_event(event)
        if event.get("event") in ("ready", "failed", "stopped"):
            outcome.append(event)

    call(Files(profile).control_socket, "watch", on_event=see, timeout=None)
    last: Event = outcome[-1] if outcome else {"event": "ended"}
    if last["event"] == "failed":
        raise error_from_dict(last["error"])
    if last["event"] != "ready":
        raise QvmError(f"the instance stopped while it was starting ({last.get('how', 'the supervisor ended')})",
                       log_path=Files(profile).supervisor_log)


def have_ready(profile: str) -> None:
    """Have a supervisor whose instance is up: one that is still starting, or adopting QEMU, is waited for."""
    ensure_supervisor(profile)
    served = find_status(profile)
    if served is not None and served["phase"] == "starting":
        watch_until_ready(profile, lambda event: None)


def supervisor_identity(profile: str) -> Identity | None:
    """The process that holds the supervisor's lock; None where nobody does."""
    path = Files(profile).supervisor_lock
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(fd, 32, 0).decode(errors="replace").strip()
        try:
            return identify(int(pid), "qvm.supervisor") if pid.isdigit() else None
        except HostError:
            return None  # it has ended since we asked for its lock
    finally:
        os.close(fd)
    return None


def wait_supervisor_gone(profile: str) -> None:
    """Wait for the end of a supervisor that has said it is done; one that hangs there is ended."""
    identity = supervisor_identity(profile)
    if identity is not None and not wait_gone(identity, Deadline(GOODBYE_TIMEOUT)):
        end_stuck_supervisor(profile)


def wait_settled(profile: str) -> None:
    """Where a supervisor lives but no QEMU of its does, wait until one of the two has changed: it is about to end, and
    must not be taken for the one that a start needs, or it boots the machine anew. One that hangs there is ended.
    """
    deadline = Deadline(GOODBYE_TIMEOUT)
    for pause in backoff(most=0.1):
        if find_run(profile) is not None or supervisor_identity(profile) is None:
            return
        if deadline.passed:
            end_stuck_supervisor(profile)
            return
        time.sleep(pause)


def end_stuck_supervisor(profile: str) -> None:
    """End a supervisor that does not answer: SIGTERM, then SIGKILL."""
    for signum, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
        identity = supervisor_identity(profile)
        if identity is None:
            return
        kill(identity, signum)
        if wait_gone(identity, Deadline(patience)):
            return

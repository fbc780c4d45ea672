"""`qvm start --foreground`: stay with the instance until it stops; a signal stops it gracefully.

SIGINT is told on after the stop, as of any interrupted program. SIGTERM and SIGHUP (a service manager's stop, a closed
terminal) are orders, and carrying them out is a success. A second signal does not wait for the guest any longer.
"""

from __future__ import annotations

import os
import signal
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from qvm.commands.stop import stop
from qvm.filenames import Files
from qvm.instance.store import find_run, lock_instance
from qvm.progress import Progress
from qvm.supervisor.client import Event, NoSupervisorError, call
from qvm.supervisor.launch import ensure_supervisor, find_status, watch_until_ready


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came; undone like an interrupt wherever one is."""


@contextmanager
def heed_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP raise Terminated in the main thread while the block runs; ignored ones stay ignored."""
    before = {}
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            before[signum] = signal.signal(signum, _terminate)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _terminate(signum: int, _frame: FrameType | None) -> None:
    if signum == signal.SIGHUP:
        # The terminal is gone, and writing to it would fail while there is a VM to stop.
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in (0, 1, 2):
            if stat.S_ISCHR(os.fstat(fd).st_mode):
                os.dup2(nowhere, fd)
        os.close(nowhere)
    raise Terminated


def stay(profile: str, *, progress: Progress) -> None:
    """Return when the instance has stopped. An interrupt stops it and is then raised on, except for Terminated."""
    try:
        _accompany(profile, progress)
    except KeyboardInterrupt as interrupt:
        try:
            stop(profile, progress=progress)
        except KeyboardInterrupt:
            progress.note("interrupted again: stopping at once")
            stop(profile, force=True, progress=progress)
        if not isinstance(interrupt, Terminated):
            raise


def _accompany(profile: str, progress: Progress) -> None:
    """Tell what happens until the instance has stopped; a supervisor that dies is replaced."""
    began = time.time()

    def see(event: Event) -> None:
        if float(event.get("time", began)) < began:  # told by the start, or long past
            return
        if event["event"] == "forward":
            progress.note(_forward(event))
        elif event["event"] == "note":
            progress.note(str(event["text"]))
        elif event["event"] == "stopped":
            progress.note(f"{profile} has stopped ({event['how']})")

    for forward in (find_status(profile) or {}).get("forwards", ()):
        progress.note(_forward(forward))
    progress.note(f"{profile} runs in the foreground; Ctrl-C stops it")
    while True:
        try:
            call(Files(profile).control_socket, "follow", on_event=see, timeout=None)
            return
        except NoSupervisorError:
            with lock_instance(profile, on_wait=progress.note):
                if find_run(profile) is None:
                    progress.note(f"{profile} has stopped")
                    return
                progress.note("the supervisor has gone; another one takes over")
                ensure_supervisor(profile)
                watch_until_ready(profile, lambda event: None)


def _forward(forward: Mapping[str, Any]) -> str:
    reason = f": {forward['reason']}" if forward.get("reason") else ""
    udp = "/udp" if forward.get("protocol") == "udp" else ""
    return f"port {forward['host']}{udp} ({forward['state']}{reason})"

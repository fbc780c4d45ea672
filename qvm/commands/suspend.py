"""`qvm suspend`, `qvm stop --suspend` and `qvm resume`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from qvm.commands.results import StartResult, SuspendResult
from qvm.commands.start import start_locked
from qvm.errors import InstanceStateError
from qvm.filenames import Files
from qvm.instance.states import find_state
from qvm.instance.store import find_run, load_record, lock_instance
from qvm.progress import Progress
from qvm.supervisor.client import call
from qvm.supervisor.launch import have_ready, wait_supervisor_gone
from qvm.supervisor.prelaunch import Prelaunched


def suspend(profile: str, *, progress: Progress) -> SuspendResult:
    """Save a running instance, with all that runs in it, and end it; the next start goes on there.

    InstanceStateError where it does not run, or where something in the guest holds a host folder (it runs on then).
    """
    load_record(profile)
    began = time.monotonic()
    with lock_instance(profile, on_wait=progress.note):
        if find_run(profile) is None:
            if find_state(Files(profile).suspended) is not None:
                return SuspendResult(profile, False, time.monotonic() - began)
            raise InstanceStateError(f"{profile!r} is not running", hint=f"`qvm start {profile}` starts it")
        with progress.step(f"suspending {profile}"):
            have_ready(profile)
            report = call(Files(profile).control_socket, "suspend", timeout=None)
            wait_supervisor_gone(profile)
        notes = tell_streamed(report, progress)
    return SuspendResult(profile, True, time.monotonic() - began, float(report["paused"]), report["timings"], notes)


def tell_streamed(report: dict[str, Any], progress: Progress) -> list[str]:
    """A note where saving took the slow way."""
    if report["streamed"] is None:
        return []
    note = f"QEMU itself saved the memory, which takes longer: {report['streamed']}"
    progress.note(note)
    return [note]


def resume(profile: str, *, progress: Progress, waiting: Prelaunched | None = None) -> StartResult:
    """Go on where `suspend` (or a restored snapshot, or a clone) left off; a running instance is left as it is.

    InstanceStateError where nothing is suspended.
    """
    load_record(profile)
    began = time.monotonic()
    with waiting or Prelaunched() as waiting, lock_instance(profile, on_wait=progress.note):
        if find_run(profile) is None and find_state(Files(profile).suspended) is None:
            raise InstanceStateError(f"{profile!r} is not suspended", hint=f"`qvm start {profile}` starts it")
        return start_locked(profile, {}, cwd=Path.cwd(), progress=progress, began=began, waiting=waiting)

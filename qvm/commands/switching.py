"""What a start does before a stopped instance comes up with another runtime than it had."""

from __future__ import annotations

from qvm.config.model import Config
from qvm.errors import HostError, UsageError
from qvm.instance.record import Record
from qvm.progress import Progress
from qvm.runtime.registry import load_runtime
from qvm.runtime.stack import load_stack
from qvm.supervisor.context import runtime_context


def switch_runtime(record: Record, wanted: Config, *, progress: Progress) -> None:
    """Take the old runtime's contexts and sockets off the host, and say what stays; nothing where it stays the same.

    Its data stays in folders of its own on the data disk, which are there again when it comes back.
    """
    old = record.config
    if old.runtime == wanted.runtime:
        return
    load_stack(wanted)  # UsageError where the new one cannot be, before anything is changed
    try:
        runtime = load_stack(old)
    except (UsageError, HostError):
        progress.note(f"switching from {old.runtime}, whose plugin cannot be loaded, to {wanted.runtime}")
        return
    context = runtime_context(record)
    for note in runtime.deactivate(context, remove=True):
        progress.note(note)
    for socket in runtime.sockets:
        context.host_socket(socket.name).unlink(missing_ok=True)
    kept = load_runtime(old.runtime).data_folders
    what = f"; {old.runtime}'s data stays on the data disk for when you switch back" if kept else ""
    progress.note(f"switching from {old.runtime} to {wanted.runtime}{what}")

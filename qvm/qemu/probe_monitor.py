"""One look at a running machine's monitor, without asyncio: for commands that only want to know."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from qvm.errors import QemuError
from qvm.qemu.wire import Wire
from qvm.wait import Deadline


@dataclass(frozen=True, slots=True)
class MonitorInfo:
    uuid: str
    status: str
    """QMP's RunState: running, paused, prelaunch, internal-error, shutdown ..."""


def probe_monitor(path: Path, timeout: float = 2.0) -> MonitorInfo | None:
    """Who answers on a monitor socket; None where nobody does within `timeout` seconds.

    A monitor serves one client at a time: while a supervisor holds it, this too gets no answer. Ask the supervisor
    first.
    """
    deadline = Deadline(timeout, "QEMU's monitor")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(deadline.left)
        try:
            connection.connect(str(path))
        except OSError:
            return None
        wire = Wire(connection.fileno(), connection.fileno(), deadline)
        try:
            wire.greet()
            uuid = wire.execute("query-uuid")
            status = wire.execute("query-status")
            return MonitorInfo(str(uuid["UUID"]), str(status["status"]))
        except (QemuError, KeyError, TypeError):
            return None

"""The CLI's side of the control socket: one request, any number of events, one answer; plain blocking sockets.

Protocol: JSON lines over a unix socket (0600). Request `{"op": ..., ...}`; replies `{"event": ...}` (zero or more)
and at last `{"result": {...}}` or `{"error": QvmError.to_dict()}`.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qvm.errors import InstanceStateError, error_from_dict

Event = dict[str, Any]


class NoSupervisorError(InstanceStateError):
    """Nobody answers on the control socket."""

    code = "no-supervisor"


def call(
    control_socket: Path,
    op: str,
    *,
    on_event: Callable[[Event], None] | None = None,
    timeout: float | None = 10.0,
    **arguments: Any,
) -> dict[str, Any]:
    """Ask the supervisor and return its result.

    `timeout` (seconds; None for none) bounds the silence between two lines. Raises the error the supervisor sent,
    or NoSupervisorError where it cannot be reached, hangs or goes away before it answered.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            connection.connect(str(control_socket))
            connection.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
            with connection.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if "error" in message:
                        raise error_from_dict(message["error"])
                    if "result" in message:
                        return dict(message["result"])
                    if on_event is not None:
                        on_event(message)
    except (OSError, ValueError) as error:
        raise NoSupervisorError(f"the supervisor does not answer: {error}") from error
    raise NoSupervisorError("the supervisor ended before it answered")

"""Ports of 127.0.0.1 on the host, each for one port of the guest under another number."""

from __future__ import annotations

import socket

from qvm.errors import PortTakenError
from qvm.guest.bind import bind_loopback, explain_refusal
from qvm.guest.dial import Connection, Dialer
from qvm.guest.relay import Listener, Relays
from qvm.log import get_logger

log = get_logger(__name__)


class HostPortForwarder:
    """Listens at one port of the host and dials one port of the guest's loopback for each connection."""

    def __init__(self, name: str, guest_port: int, dialer: Dialer) -> None:
        self.name = name
        self.guest_port = guest_port
        self.port = 0
        """The host's; 0 before `start`."""
        self._dialer = dialer
        self._relays = Relays()
        self._listeners: list[Listener] = []

    def start(self, *, wish: int, last: int) -> int:
        """Listen at `wish`; where that is 0, at `last` while it is free, else at any port. Returns the number.

        PortTakenError where the wish cannot be had.
        """
        sockets = _bind(wish) if wish else _bind_any(last)
        self.port = int(sockets[0].getsockname()[1])
        self._listeners = [self._relays.serve(sock, self._dial, name=f"{self.name} port {self.port}")
                           for sock in sockets]
        return self.port

    async def _dial(self) -> Connection:
        return await self._dialer.open_tcp("127.0.0.1", self.guest_port)

    async def close(self) -> None:
        """Stop listening and break what is under way. Idempotent."""
        for listener in self._listeners:
            listener.close()
        self._listeners = []
        await self._relays.close()


def _bind(port: int) -> list[socket.socket]:
    try:
        return bind_loopback(port)
    except OSError as error:
        state, reason = explain_refusal(error, port)
        hint = "end what listens there, or choose another port" if state == "taken" else "choose another port"
        raise PortTakenError(reason, hint=hint) from error


def _bind_any(last: int) -> list[socket.socket]:
    if last:
        try:
            return bind_loopback(last)
        except OSError as error:
            log.info("port %d cannot be had again (%s): another one is taken", last, error)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = int(probe.getsockname()[1])
    return _bind(free)

"""Forwards from the guest to the host: what connects to a port or socket in the guest reaches one of the host.

The agent listens for us. Its listeners end with its session, so each rule has a task that listens anew.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

from qvm.config.ports import LOOPBACK, PortForward, Ports, SocketPath
from qvm.errors import QvmError
from qvm.guest.dial import Connection, GuestBinder, GuestListener
from qvm.guest.portplan import format_endpoint
from qvm.guest.relay import relay
from qvm.log import get_logger
from qvm.wait import backoff

log = get_logger(__name__)

CONNECT_TIMEOUT = 10.0
"""Seconds for the host's service to take a connection."""


class ReverseForwards:
    """Keeps the rules' listeners in the guest open. Lives in one event loop."""

    def __init__(self, binder: GuestBinder) -> None:
        self.on_change: Callable[[dict[str, Any]], None] | None = None
        self._binder = binder
        self._ways: dict[tuple[str, int], _Way] = {}
        self._relays: set[asyncio.Task[None]] = set()

    def set_rules(self, rules: Sequence[PortForward]) -> None:
        """Only reverse ones count."""
        wanted = {(str(rule), number): (rule, number) for rule in rules if rule.reverse for number in _numbers(rule)}
        for key in self._ways.keys() - wanted.keys():
            self._ways.pop(key).stop()
        for key in wanted.keys() - self._ways.keys():
            self._ways[key] = _Way(self, *wanted[key])

    def status(self) -> list[dict[str, Any]]:
        return [way.to_dict() for _, way in sorted(self._ways.items())]

    async def close(self) -> None:
        tasks = [way.stop() for way in self._ways.values()] + list(self._relays)
        self._ways = {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def listen(self, end: Ports | SocketPath, number: int) -> GuestListener:
        if isinstance(end, SocketPath):
            return await self._binder.listen_unix(end.path)
        return await self._binder.listen_tcp(end.address or LOOPBACK, number)

    def begin(self, way: _Way, connection: Connection) -> None:
        task = asyncio.create_task(_connect(way, connection))
        self._relays.add(task)
        task.add_done_callback(self._relays.discard)


class _Way:
    """One listener in the guest."""

    def __init__(self, forwards: ReverseForwards, rule: PortForward, number: int) -> None:
        self.rule = rule
        self._forwards = forwards
        self._number = number
        self._state, self._reason = "opening", ""
        self._task = asyncio.create_task(self._keep(), name=f"reverse forward {rule}")

    def to_dict(self) -> dict[str, Any]:
        return {"protocol": "tcp", "guest": self._guest(), "host": self._host(), "port": None, "state": self._state,
                "reason": self._reason or None, "path": "reverse", "rule": str(self.rule)}

    def _guest(self) -> str:
        end = self.rule.guest
        return str(end) if isinstance(end, SocketPath) else format_endpoint(end.address or LOOPBACK, self._number)

    def _host(self) -> str:
        end = self.rule.host
        return format_endpoint(*self.host_port()) if isinstance(end, Ports) else str(end)

    def host_port(self) -> tuple[str, int]:
        end, guest = self.rule.host, self.rule.guest
        assert isinstance(end, Ports)
        offset = self._number - guest.first if isinstance(guest, Ports) else 0
        return end.address or LOOPBACK, end.first + offset

    def stop(self) -> asyncio.Task[None]:
        self._task.cancel()
        if self._state == "forwarding":
            self._become("stopped")
        return self._task

    async def _keep(self) -> None:
        """Listen until it fails, and again; a guest that refuses is asked once a second."""
        pauses = backoff(first=0.05, most=1.0)
        while True:
            listener = None
            try:
                listener = await self._forwards.listen(self.rule.guest, self._number)
                self._become("forwarding")
                pauses = backoff(first=0.05, most=1.0)
                while True:
                    self._forwards.begin(self, await listener.accept())
            except QvmError as error:
                self._become("failed", error.message)
            finally:
                if listener is not None:
                    await listener.close()
            await asyncio.sleep(next(pauses))

    def _become(self, state: str, reason: str = "") -> None:
        if (state, reason) != (self._state, self._reason):
            self._state, self._reason = state, reason
            if self._forwards.on_change is not None:
                self._forwards.on_change(self.to_dict())


async def _connect(way: _Way, connection: Connection) -> None:
    loop = asyncio.get_running_loop()
    end = way.rule.host
    address: Any = way.host_port() if isinstance(end, Ports) else str(end)
    six = isinstance(address, tuple) and ":" in address[0]
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if six else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.timeout(CONNECT_TIMEOUT):
            await loop.sock_connect(sock, address)
    except (OSError, TimeoutError) as error:
        log.info("reverse forward %s: the host refused: %s", way.rule, error)
        sock.close()
        await connection.close()
        return
    except asyncio.CancelledError:
        sock.close()
        await connection.close()
        raise
    await relay(sock, connection)


def _numbers(rule: PortForward) -> list[int]:
    """The guest's ports, 0 for a socket."""
    return list(range(rule.guest.first, rule.guest.last + 1)) if isinstance(rule.guest, Ports) else [0]

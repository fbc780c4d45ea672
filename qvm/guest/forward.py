"""TCP listeners of the guest at the host's 127.0.0.1, with the same port number, for as long as they listen.

The agent reports who listens; `PortForwarder.set_listeners` takes the whole list each time and makes the host match.
Connections are dialled from within the guest, so its loopback listeners are reachable too. Nothing is ever bound to
an address other than the host's loopback.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from qvm.errors import QvmError
from qvm.guest.dial import Connection, Dialer
from qvm.guest.relay import BACKLOG, Listener, Relays
from qvm.log import get_logger

log = get_logger(__name__)

RETRY_PAUSE = 1.0
SSH_PORT = 22
HOST = "127.0.0.1"
# systemd-resolved's stub resolvers: the guest's own business, and port 53 of the host is not theirs.
_NOT_FOR_HOST = {"127.0.0.53", "127.0.0.54"}

State = Literal["forwarding", "taken", "denied", "failed", "stopped"]


def dial_order(addresses: Iterable[str]) -> tuple[str, ...]:
    """Where in the guest to dial a port that is listened to at `addresses`, best first; () where nowhere.

    A wildcard is reached through loopback; `::` mostly takes IPv4 as well (net.ipv6.bindv6only), so both are tried.
    """
    ranked: dict[str, int] = {}
    for text in addresses:
        address = ipaddress.ip_address(text.split("%", 1)[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        if str(address) in _NOT_FOR_HOST or address.is_link_local:
            continue
        if address.is_unspecified and address.version == 6:
            targets = {"127.0.0.1": 1, "::1": 2}
        elif address.is_unspecified:
            targets = {"127.0.0.1": 0}
        else:
            targets = {str(address): 0 if str(address) == "127.0.0.1" else 2 if address.is_loopback else 3}
        for target, rank in targets.items():
            ranked[target] = min(rank, ranked.get(target, rank))
    return tuple(sorted(ranked, key=lambda target: (ranked[target], target)))


def format_endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@dataclass(slots=True)
class _Forward:
    """One guest port: what is wanted, what has been bound, and why not."""

    port: int
    guest: str
    targets: tuple[str, ...]
    state: State = "failed"
    reason: str | None = None
    listeners: list[Listener] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "guest": format_endpoint(self.guest, self.port),
            "host": format_endpoint(HOST, self.port),
            "port": self.port,
            "state": self.state,
            "reason": self.reason,
        }


class PortForwarder:
    """Keeps 127.0.0.1 of the host in step with the guest's TCP listeners. Lives in one event loop."""

    def __init__(
        self,
        dialer: Dialer,
        *,
        ignore: Collection[int] = (),
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """`ignore`: ports never forwarded (22 is always among them). `on_event` gets a status entry on each change."""
        self._dialer = dialer
        self._ignore = {SSH_PORT, *ignore}
        self._on_event = on_event
        self._forwards: dict[int, _Forward] = {}
        self._relays = Relays()
        self._retrying: asyncio.Task[None] | None = None

    def set_listeners(self, listeners: Iterable[tuple[str, int]]) -> None:
        """The guest's TCP listeners as (address, port), all of them; what is no longer among them is closed.

        Connections under way live until they end by themselves.
        """
        by_port: dict[int, list[str]] = {}
        for address, port in listeners:
            if port not in self._ignore:
                by_port.setdefault(port, []).append(address)
        wanted = {port: (addresses, dial_order(addresses)) for port, addresses in sorted(by_port.items())}
        wanted = {port: found for port, found in wanted.items() if found[1]}
        for port in self._forwards.keys() - wanted.keys():
            self._stop(port)
        for port, (addresses, targets) in wanted.items():
            forward = self._forwards.get(port)
            if forward is None:
                forward = self._forwards[port] = _Forward(port, addresses[0], targets)
                self._try_to_bind(forward)
            forward.guest, forward.targets = addresses[0], targets
        self._retry_if_needed()

    def ignore(self, ports: Collection[int]) -> None:
        """Never forward these from the next `set_listeners` on."""
        self._ignore |= set(ports)

    def status(self) -> list[dict[str, Any]]:
        """One entry per guest port: guest, host ("127.0.0.1:8080"), port, state, reason.

        state: forwarding; taken (another process has the host's port) and denied (a privilege is missing), both
        retried every second; failed (any other refusal of the host, retried too).
        """
        return [forward.to_dict() for _, forward in sorted(self._forwards.items())]

    @property
    def connections(self) -> int:
        """Forwarded connections under way."""
        return self._relays.count

    async def close(self) -> None:
        """Close all listeners and break all connections."""
        if self._retrying is not None:
            self._retrying.cancel()
            await asyncio.gather(self._retrying, return_exceptions=True)
            self._retrying = None
        for port in list(self._forwards):
            self._stop(port)
        await self._relays.close()

    def _stop(self, port: int) -> None:
        forward = self._forwards.pop(port)
        for listener in forward.listeners:
            listener.close()
        if forward.state == "forwarding":
            forward.state, forward.reason = "stopped", None
            self._tell(forward)

    def _try_to_bind(self, forward: _Forward) -> None:
        before = forward.state, forward.reason
        try:
            sockets = bind_loopback(forward.port)
        except OSError as error:
            forward.state, forward.reason = explain_refusal(error, forward.port)
        else:
            forward.state, forward.reason = "forwarding", None
            forward.listeners = [
                self._relays.serve(sock, lambda: self._dial(forward), name=f"port {forward.port}") for sock in sockets
            ]
        if (forward.state, forward.reason) != before:
            self._tell(forward)

    async def _dial(self, forward: _Forward) -> Connection:
        """The first of the guest's addresses that answers."""
        *others, last = forward.targets
        for target in others:
            try:
                return await self._dialer.open_tcp(target, forward.port)
            except QvmError as error:
                log.debug("%s refused: %s", format_endpoint(target, forward.port), error)
        return await self._dialer.open_tcp(last, forward.port)

    def _retry_if_needed(self) -> None:
        if self._retrying is None and any(forward.state != "forwarding" for forward in self._forwards.values()):
            self._retrying = asyncio.create_task(self._retry(), name="retry of taken ports")

    async def _retry(self) -> None:
        """The host tells nobody when a port becomes free, so it is asked once a second while one is wanted."""
        while waiting := [forward for forward in self._forwards.values() if forward.state != "forwarding"]:
            await asyncio.sleep(RETRY_PAUSE)
            for forward in waiting:
                if self._forwards.get(forward.port) is forward:
                    self._try_to_bind(forward)
        self._retrying = None

    def _tell(self, forward: _Forward) -> None:
        entry = forward.to_dict()
        log.info("port %(port)d: %(state)s (%(reason)s)", entry)
        if self._on_event is not None:
            self._on_event(entry)


def bind_loopback(port: int) -> list[socket.socket]:
    """Listening sockets at 127.0.0.1:`port` and, where the host has it and it is free, [::1]:`port`.

    Many programs try ::1 first for "localhost"; without it they lose time but still arrive. OSError where
    127.0.0.1 cannot be had.
    """
    sockets = [_listen(socket.AF_INET, HOST, port)]
    try:
        sockets.append(_listen(socket.AF_INET6, "::1", port))
    except OSError as error:
        log.debug("no listener at [::1]:%d: %s", port, error)
    return sockets


def _listen(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform.startswith("linux"):
            # Rebinding past TIME_WAIT. Elsewhere it would also bind over another program's wildcard listener.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def explain_refusal(error: OSError, port: int) -> tuple[State, str]:
    """What a failed bind means to the user, with what mends it."""
    if error.errno == errno.EADDRINUSE:
        return "taken", f"another process on this host listens on port {port}; it is forwarded once that one ends"
    if error.errno in (errno.EACCES, errno.EPERM):
        mend = (f"`sudo sysctl net.ipv4.ip_unprivileged_port_start={port}` allows it"
                if sys.platform.startswith("linux") else "publish the container on a port of 1024 or above")
        return "denied", f"port {port} needs a privilege on this host; {mend}"
    return "failed", f"port {port} cannot be bound: {error.strerror or error}"

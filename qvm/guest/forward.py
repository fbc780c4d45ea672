"""What listens in the guest, at the host, for as long as it listens.

The agent reports who listens; `PortForwarder.set_listeners` takes the whole list each time and makes the host match:
as the rules say, and by default at the host's loopback with the same port number (`qvm.guest.portplan`). Each forward
goes one of two ways:

- the tunnel: a socket of ours on the host, and for each connection one that is dialled from within the guest, so that
  its loopback listeners and unix sockets are reachable too (for UDP, `qvm.guest.datagrams`);
- the user network: QEMU accepts and sends packets to the guest's network card. It takes no work from the guest, but
  reaches only what listens at the guest's own address, and only IPv4.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qvm.config.ports import LOOPBACK, PortForward, Ports, SocketPath
from qvm.errors import GuestError, HostError, QvmError
from qvm.guest.bind import State, bind_companion, bind_one, bind_ports, explain_refusal
from qvm.guest.datagrams import DatagramRelay
from qvm.guest.dial import Connection, DatagramDialer, Datagrams, Dialer, UserNetwork
from qvm.guest.portplan import Listener, Wanted, format_endpoint, plan
from qvm.guest.relay import Relays
from qvm.guest.reverse import ReverseForwards
from qvm.guest.sockets import bind_unix
from qvm.log import get_logger

log = get_logger(__name__)

RETRY_PAUSE = 1.0
SSH_PORT = 22
MAX_EVENTS = 100
"""Kept for `status`."""
_EVENTS = {"forwarding": "forwarding", "stopped": "stopped"}
"""State -> event; every other state is a `failed`."""


class Binding(Protocol):
    """Something bound on the host, which `close` frees."""

    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class _Forward:
    """What is wanted, what has been bound for it, and why not."""

    wanted: Wanted
    state: State = "failed"
    reason: str | None = None
    path: str | None = None
    """tunnel or user-network."""
    bindings: list[Binding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        host = self.wanted.host
        port = host.first if isinstance(host, Ports) else None
        return {
            "protocol": self.wanted.protocol,
            "guest": self.wanted.guest,
            "host": str(host) if port is None else format_endpoint(_address(self.wanted), port),
            "port": port,
            "state": self.state,
            "reason": self.reason,
            "path": self.path,
            "rule": str(self.wanted.rule) if self.wanted.rule is not None else None,
        }


def _address(wanted: Wanted) -> str:
    return (isinstance(wanted.host, Ports) and wanted.host.address) or LOOPBACK


def _end(wanted: Wanted) -> tuple[str, str, int]:
    """What QEMU would bind for it."""
    return wanted.protocol, _address(wanted), wanted.host.first if isinstance(wanted.host, Ports) else 0


class PortForwarder:
    """Keeps the host in step with the guest's listeners and the rules. Lives in one event loop."""

    def __init__(
        self,
        dialer: Dialer,
        *,
        rules: Sequence[PortForward] = (),
        automatic: bool = True,
        datagrams: DatagramDialer | None = None,
        user_network: UserNetwork | None = None,
        by_user_network: Collection[str] = (),
        reverse: ReverseForwards | None = None,
        ignore: Collection[int] = (),
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """`ignore`: TCP ports never forwarded (22 is always among them). `by_user_network`: protocols that go this way
        where it can reach the listener. `on_event` gets a status entry, and `event`, on each change."""
        self._dialer = dialer
        self._datagrams = datagrams
        self._user_network = user_network
        self._by_user_network = by_user_network if user_network is not None else ()
        self._automatic = automatic
        self._rules = tuple(rules)
        self._reverse = reverse
        self._ignore = {SSH_PORT, *ignore}
        self._on_event = on_event
        self._listeners: list[Listener] = []
        self._forwards: dict[tuple[str, str, str], _Forward] = {}
        self._relays = Relays()
        self._retrying: asyncio.Task[None] | None = None
        self._asking: set[asyncio.Task[None]] = set()
        self._leaving: set[tuple[str, str, int]] = set()
        self.events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        if reverse is not None:
            reverse.on_change = self._tell

    def set_listeners(self, tcp: Iterable[tuple[str, int]], udp: Iterable[tuple[str, int]] = ()) -> None:
        """The guest's listeners as (address, port), all of them; what is no longer among them is closed.

        Connections under way live until they end by themselves.
        """
        self._listeners = [Listener("tcp", *item) for item in tcp] + [Listener("udp", *item) for item in udp]
        self._follow()

    def set_rules(self, rules: Sequence[PortForward]) -> None:
        """Take other rules; what is the same in both goes on undisturbed."""
        self._rules = tuple(rules)
        if self._reverse is not None:
            self._reverse.set_rules(self._rules)
        self._follow()

    def ignore(self, ports: Iterable[int]) -> None:
        """TCP ports that are not to be forwarded from the next `set_listeners` on."""
        self._ignore |= set(ports)

    def begin(self) -> None:
        """Open what needs no listener: sockets of the guest, and the other direction."""
        self.set_rules(self._rules)

    def _follow(self) -> None:
        """Make what is bound what is wanted."""
        wishes = plan(self._listeners, self._rules, automatic=self._automatic, ignore=self._ignore,
                      user_network=self._by_user_network)
        wanted = {wish.key: wish for wish in wishes}
        for key in list(self._forwards):
            if key not in wanted or not self._forwards[key].wanted.can_become(wanted[key]):
                self._stop(key)
        for key, wish in wanted.items():
            forward = self._forwards.get(key)
            if forward is None:
                forward = self._forwards[key] = _Forward(wish)
                self._try_to_bind(forward)
            forward.wanted = wish
        self._retry_if_needed()

    def status(self) -> list[dict[str, Any]]:
        """One entry per forward: protocol, guest, host ("127.0.0.1:8080"), its port, state, reason, path, rule.

        state: forwarding; taken (another process has the host's port) and denied (a privilege is missing), both
        retried every second; failed (any other refusal, retried too); opening (QEMU is being asked).
        """
        ours = [self._forwards[key].to_dict() for key in sorted(self._forwards, key=_order)]
        return ours + (self._reverse.status() if self._reverse is not None else [])

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
        for key in list(self._forwards):
            self._stop(key)
        if self._reverse is not None:
            await self._reverse.close()
        while self._asking:  # what QEMU has taken meanwhile is taken back
            await asyncio.gather(*self._asking, return_exceptions=True)
        await self._relays.close()

    def _stop(self, key: tuple[str, str, str]) -> None:
        forward = self._forwards.pop(key)
        self._unbind(forward)
        if forward.state == "forwarding":
            forward.state, forward.reason = "stopped", None
            self._tell(forward.to_dict())

    def _unbind(self, forward: _Forward) -> None:
        for binding in forward.bindings:
            binding.close()
        forward.bindings = []

    def _try_to_bind(self, forward: _Forward, *, tunnel: bool = False) -> None:
        """`tunnel`: not by the user network, which has refused."""
        before = forward.state, forward.reason
        wanted = forward.wanted
        try:
            if wanted.conflict is not None:
                forward.state, forward.reason = "taken", wanted.conflict
            elif _end(wanted) in self._leaving:
                forward.state, forward.reason = "opening", None
            elif wanted.user_network and not tunnel:
                self._open_user_network(forward)
            else:
                forward.path = "tunnel"
                forward.bindings = self._open_tunnel(forward)
                forward.state, forward.reason = "forwarding", None
        except OSError as error:
            port = wanted.host.first if isinstance(wanted.host, Ports) else 0
            forward.state, forward.reason = explain_refusal(error, port)
        except HostError as error:
            forward.state, forward.reason = "failed", error.message
        if (forward.state, forward.reason) != before and forward.state != "opening":
            self._tell(forward.to_dict())

    def _open_tunnel(self, forward: _Forward) -> list[Binding]:
        wanted = forward.wanted
        name = f"{wanted.protocol} {wanted.host}"
        if isinstance(wanted.host, SocketPath):
            path = Path(wanted.host.path)
            listener = self._relays.serve(bind_unix(path), lambda: self._dial(forward), name=name)
            return [listener, _SocketFile(path)]
        return self._serve(forward, bind_ports(wanted.host, wanted.protocol), name)

    def _serve(self, forward: _Forward, sockets: list[socket.socket], name: str) -> list[Binding]:
        if forward.wanted.protocol == "udp":
            return [DatagramRelay(sock, lambda: self._dial_udp(forward), name=name) for sock in sockets]
        return [self._relays.serve(sock, lambda: self._dial(forward), name=name) for sock in sockets]

    def _open_user_network(self, forward: _Forward) -> None:
        """Ask QEMU, after a look of our own, since it says nothing about why it could not. OSError."""
        wanted = forward.wanted
        assert isinstance(wanted.host, Ports)
        port = wanted.host.first
        bind_one(_address(wanted), port, wanted.protocol).close()
        forward.path, forward.state, forward.reason = "user-network", "opening", None
        companions = bind_companion(port, wanted.protocol) if wanted.host.address is None else []
        forward.bindings = self._serve(forward, companions, f"{wanted.protocol} [::1]:{port}")
        self._in_background(self._add_to_user_network(forward, _address(wanted), port))

    async def _add_to_user_network(self, forward: _Forward, address: str, port: int) -> None:
        wanted, network = forward.wanted, self._user_network
        assert network is not None
        current = self._forwards.get(wanted.key) is forward
        if not current:
            return
        try:
            await network.add(wanted.protocol, address, port, wanted.port)
        except QvmError as error:
            log.warning("%s; the tunnel does it", error.message)
            if self._forwards.get(wanted.key) is forward:
                self._unbind(forward)
                self._try_to_bind(forward, tunnel=True)
                self._retry_if_needed()
            return
        binding = _UserNetworkBinding(self, wanted.protocol, address, port)
        if self._forwards.get(wanted.key) is not forward:  # the listener has gone meanwhile
            binding.close()
            return
        forward.bindings.append(binding)
        forward.state = "forwarding"
        self._tell(forward.to_dict())

    def remove_from_user_network(self, protocol: str, address: str, port: int) -> None:
        assert self._user_network is not None
        self._leaving.add((protocol, address, port))
        self._in_background(self._remove(self._user_network, protocol, address, port))

    async def _remove(self, network: UserNetwork, protocol: str, address: str, port: int) -> None:
        """And let in what has waited for that."""
        end = protocol, address, port
        await network.remove(*end)
        self._leaving.discard(end)
        for forward in list(self._forwards.values()):
            if forward.state == "opening" and not forward.bindings and _end(forward.wanted) == end:
                self._try_to_bind(forward)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def _dial(self, forward: _Forward) -> Connection:
        """The first of the guest's addresses that answers."""
        wanted = forward.wanted
        *others, last = wanted.targets
        if wanted.port == 0:
            return await self._dialer.open_unix(last)
        for target in others:
            try:
                return await self._dialer.open_tcp(target, wanted.port)
            except QvmError as error:
                log.debug("%s refused: %s", format_endpoint(target, wanted.port), error)
        return await self._dialer.open_tcp(last, wanted.port)

    async def _dial_udp(self, forward: _Forward) -> Datagrams:
        if self._datagrams is None:
            raise GuestError("UDP does not go through SSH")
        return await self._datagrams.open_udp(forward.wanted.targets[0], forward.wanted.port)

    def _waiting(self) -> list[_Forward]:
        return [forward for forward in self._forwards.values()
                if forward.state not in ("forwarding", "opening") and forward.wanted.conflict is None]

    def _retry_if_needed(self) -> None:
        if self._retrying is None and self._waiting():
            self._retrying = asyncio.create_task(self._retry(), name="retry of taken ports")

    async def _retry(self) -> None:
        """The host tells nobody when a port becomes free, so it is asked once a second while one is wanted."""
        while waiting := self._waiting():
            await asyncio.sleep(RETRY_PAUSE)
            for forward in waiting:
                if self._forwards.get(forward.wanted.key) is forward and forward in self._waiting():
                    self._try_to_bind(forward)
        self._retrying = None

    def _tell(self, entry: dict[str, Any]) -> None:
        event = {**entry, "event": _EVENTS.get(entry["state"], "failed"), "time": time.time()}
        self.events.append(event)
        log.info("%s %s %s <- %s%s", event["event"], entry["protocol"], entry["guest"], entry["host"],
                 f": {entry['reason']}" if entry["reason"] else "")
        if self._on_event is not None:
            self._on_event(event)


def _order(key: tuple[str, str, str]) -> tuple[str, int, str, str]:
    protocol, guest, rule = key
    return protocol, int(guest) if guest.isdigit() else 0, guest, rule


@dataclass(frozen=True, slots=True)
class _UserNetworkBinding:
    forwarder: PortForwarder
    protocol: str
    address: str
    port: int

    def close(self) -> None:
        self.forwarder.remove_from_user_network(self.protocol, self.address, self.port)


@dataclass(frozen=True, slots=True)
class _SocketFile:
    path: Path

    def close(self) -> None:
        self.path.unlink(missing_ok=True)

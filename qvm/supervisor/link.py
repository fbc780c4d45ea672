"""The supervisor's hold on the guest: the agent's channel, the byte streams, and what rides on them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from qvm.agentbundle import agent_source
from qvm.config.ports import PortForward
from qvm.errors import QvmError
from qvm.filenames import Files
from qvm.guest.channel import AgentChannel
from qvm.guest.dial import Connection, Dialer
from qvm.guest.forward import PortForwarder
from qvm.guest.protocol import Hello
from qvm.guest.reverse import ReverseForwards
from qvm.guest.sockets import SocketForwarder
from qvm.guest.ssh import SshConnection, SshTarget
from qvm.guest.streams import StreamMux
from qvm.log import get_logger
from qvm.runtime.base import HostSocket
from qvm.supervisor.usernet import QemuUserNetwork

log = get_logger(__name__)

SHUTDOWN_ASK_TIMEOUT = 5.0
REHEARSAL_TIMEOUT = 10.0
BY_USER_NETWORK = {"auto": ("udp",), "user": ("tcp", "udp"), "ssh": (), "none": ("udp",)}
"""The setting portForwarder -> protocols that go by QEMU's own forwards where these can reach the listener.

For TCP the agent's streams are the better way (benchmarks/network.py): several times the throughput out of the guest,
IPv6, no connection lost where hundreds come at once, and the guest sees its own loopback as the client.
"""


class PreferStreams:
    """A `Dialer`: the agent's byte streams while they live, else SSH.

    Streams come first because they cost no handshake and no cipher (ARCHITECTURE.md has the figures); SSH is connected
    only when they are down, so paramiko is not even loaded otherwise.
    """

    def __init__(self, streams: StreamMux, ssh: SshConnection) -> None:
        self._streams = streams
        self._ssh = ssh

    def _dialer(self) -> Dialer:
        return self._streams if self._streams.live else self._ssh

    async def open_tcp(self, host: str, port: int) -> Connection:
        return await self._dialer().open_tcp(host, port)

    async def open_unix(self, path: str) -> Connection:
        return await self._dialer().open_unix(path)


class GuestLink:
    """Made once per QEMU process; `open` waits for the guest's agent, `close` lets go of everything on the host."""

    def __init__(
        self,
        files: Files,
        ssh: SshTarget,
        *,
        publish: Callable[..., None],
        on_new_session: Callable[[], Awaitable[None]],
        rules: Sequence[PortForward] = (),
        own_rules: Sequence[PortForward] = (),
        port_forwarder: str = "auto",
        user_network: QemuUserNetwork | None = None,
    ) -> None:
        """`on_new_session` runs after the agent has started anew (a guest reboot, a crash) and answers again.
        `own_rules` are those that no setting of forwards changes; `port_forwarder` is the setting of that name."""
        self._own_rules = tuple(own_rules)
        self._files = files
        self._publish = publish
        self._on_new_session = on_new_session
        self._opened = False
        self._again: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._rehearsals: set[asyncio.Task[None]] = set()
        self._ssh = SshConnection(ssh)
        self.channel = AgentChannel(on_event=self._on_agent_event)
        self.streams = StreamMux(self.channel)
        self.dialer = PreferStreams(self.streams, self._ssh)
        self._user_network = user_network
        by_ssh = port_forwarder == "ssh"
        self._forwarder = PortForwarder(
            self._ssh if by_ssh else self.dialer, rules=(*own_rules, *rules), automatic=port_forwarder != "none",
            datagrams=None if by_ssh else self.streams, user_network=user_network,
            by_user_network=BY_USER_NETWORK[port_forwarder], reverse=ReverseForwards(self.streams),
            ignore={22, ssh.port}, on_event=self._on_forward,
        )  # fmt: skip
        self._sockets: list[SocketForwarder] = []
        self._listeners: list[tuple[str, int]] = []
        self._udp_listeners: list[tuple[str, int]] = []
        self._extra_listeners: list[tuple[str, int]] = []

    async def open(self) -> None:
        """Connect and begin: agent up to date, clock right, streams and listener reports running."""
        hello = await self.greet(timeout=None)
        log.info("the agent answered %.1f s after its kernel started", hello.uptime)
        if await self.channel.update(agent_source()):
            log.info("the guest's agent was another version and has been replaced")
        await self.channel.set_clock()
        await self.begin_service()

    async def greet(self, *, timeout: float | None) -> Hello:
        """Connect and wait up to `timeout` seconds for the agent's answer; may be begun before the guest runs."""
        await self.channel.connect(self._files.agent_socket)
        return await self.channel.hello(timeout=timeout)

    async def begin_service(self) -> None:
        """Streams, and from now on a new session of the agent is taken up by itself.

        Listener reports begin beside what comes next: the first one reads CNI's and the kernel's tables, which takes a
        restored guest 0.2 s, and a runtime's socket need not wait for it.
        """
        await self.streams.connect(self._files.stream_socket)
        self.channel.streams = self.dialer
        try:
            if self._user_network is not None:
                await self._user_network.clear()
        except QvmError as error:
            log.warning("forwards of an earlier supervisor may be left: %s", error)
        self._forwarder.begin()
        self._listening = asyncio.create_task(self._watch_listeners(), name="listeners")
        self._opened = True

    def rehearse(self, wanted: Sequence[HostSocket]) -> None:
        """Have restored runtimes answer once, beside what else is to be done, so that the user's first is not slow."""
        for socket in wanted:
            if socket.rehearsal:
                task = asyncio.create_task(self._rehearse(socket), name=f"rehearse {socket.name}")
                self._rehearsals.add(task)
                task.add_done_callback(self._rehearsals.discard)

    async def _rehearse(self, socket: HostSocket) -> None:
        try:
            async with asyncio.timeout(REHEARSAL_TIMEOUT):
                connection = await self.streams.open_unix(str(socket.guest_path))
                try:
                    await connection.send(socket.rehearsal)
                    while await connection.recv():
                        pass
                finally:
                    await connection.close()
        except (QvmError, TimeoutError) as error:
            log.info("the rehearsal of %s: %s", socket.name, error)  # whoever asks next hears the same, in earnest

    async def _watch_listeners(self) -> None:
        try:
            await self.channel.watch_listeners()
        except QvmError as error:
            # Where the agent starts anew meanwhile, its new session asks again.
            log.warning("the guest's listeners are not watched: %s", error)
            self._publish("note", text=f"ports are not forwarded: {error.message}")

    async def open_sockets(self, wanted: Sequence[HostSocket]) -> None:
        for socket in wanted:
            forwarder = SocketForwarder(self._files.host_socket(socket.name), str(socket.guest_path), self.dialer)
            await forwarder.start()
            self._sockets.append(forwarder)

    def _on_agent_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "listeners":
            self._listeners = [(str(host), int(port)) for host, port in event["tcp"]]
            self._udp_listeners = [(str(host), int(port)) for host, port in event.get("udp", ())]
            self._forward_listeners()
        elif event["event"] == "session" and self._opened:  # before that, it is the one that `open` itself begins
            self._again = asyncio.ensure_future(self._begin_again())

    def set_extra_listeners(self, ports: Sequence[tuple[str, int]]) -> None:
        """Ports that answer in the guest although nobody listens there; a real listener of that number comes first."""
        self._extra_listeners = list(ports)
        self._forward_listeners()

    def ignore_ports(self, ports: Collection[int]) -> None:
        """Guest ports that the host gets in another way."""
        self._forwarder.ignore(ports)
        self._forward_listeners()

    def _forward_listeners(self) -> None:
        taken = {port for _, port in self._listeners}
        extra = [(address, port) for address, port in self._extra_listeners if port not in taken]
        self._forwarder.set_listeners([*self._listeners, *extra], self._udp_listeners)

    async def _begin_again(self) -> None:
        try:
            await self.channel.set_clock()
            await self._on_new_session()
        except QvmError as error:
            log.exception("the guest could not be taken up again")
            self._publish("note", text=f"the guest started anew, but: {error.message}")

    def _on_forward(self, event: dict[str, Any]) -> None:
        self._publish("forward", **{key: value for key, value in event.items() if key not in ("event", "time")})

    async def ask_shutdown(self) -> None:
        """Ask the guest to power off; where it cannot hear us, the ladder's next rungs do it."""
        try:
            async with asyncio.timeout(SHUTDOWN_ASK_TIMEOUT):
                await self.channel.shutdown()
        except (QvmError, TimeoutError, ConnectionError) as error:
            log.warning("the agent was not asked to shut down: %s", error)

    def set_rules(self, rules: Sequence[PortForward]) -> None:
        self._forwarder.set_rules((*self._own_rules, *rules))

    def forwards(self) -> list[dict[str, Any]]:
        return [dict(entry) for entry in self._forwarder.status()]

    def forward_events(self) -> list[dict[str, Any]]:
        """The last ones: status entries with `event` (forwarding, failed, stopped) and `time` (since the epoch)."""
        return list(self._forwarder.events)

    def sockets(self) -> dict[str, str]:
        return {forwarder.host_path.stem: str(forwarder.host_path) for forwarder in self._sockets}

    async def close(self) -> None:
        for task in (self._again, self._listening, *self._rehearsals):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        for forwarder in self._sockets:
            await forwarder.close()
        self._sockets = []
        await self._forwarder.close()
        await self.streams.close()
        await self._ssh.close()
        await self.channel.close()

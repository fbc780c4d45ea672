"""The supervisor's hold on the guest: the agent's channel, the byte streams, and what rides on them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from qvm.errors import QvmError
from qvm.filenames import Files
from qvm.guest.channel import AgentChannel, Hello
from qvm.guest.forward import PortForwarder
from qvm.guest.sockets import SocketForwarder
from qvm.guest.streams import StreamMux
from qvm.log import get_logger
from qvm.runtime.base import HostSocket

log = get_logger(__name__)

SHUTDOWN_ASK_TIMEOUT = 5.0


class GuestLink:
    """Made once per QEMU process; `open` waits for the guest's agent, `close` lets go of everything on the host."""

    def __init__(self, files: Files, ssh_port: int, *, publish: Callable[..., None]) -> None:
        self._files = files
        self._publish = publish
        self.channel = AgentChannel(on_event=self._on_agent_event)
        self.streams = StreamMux()
        self._forwarder = PortForwarder(self.streams, ignore={22, ssh_port}, on_event=self._on_forward)
        self._sockets: list[SocketForwarder] = []

    async def open(self) -> None:
        await self.channel.connect(self._files.agent_socket)
        hello: Hello = await self.channel.hello(timeout=None)
        log.info("the agent answered: %s", hello)
        await self.streams.connect(self._files.stream_socket)
        await self.channel.set_clock()
        await self.channel.watch_listeners()

    async def open_sockets(self, wanted: Sequence[HostSocket]) -> None:
        for socket in wanted:
            forwarder = SocketForwarder(
                self._files.host_socket(socket.name), str(socket.guest_path), self.streams
            )
            await forwarder.start()
            self._sockets.append(forwarder)

    def _on_agent_event(self, event: dict[str, Any]) -> None:
        if event.get("event") == "listeners":
            self._forwarder.set_listeners([(str(host), int(port)) for host, port in event["tcp"]])

    def _on_forward(self, event: dict[str, Any]) -> None:
        log.info("forward: %s", event)
        self._publish("forward", **event)

    async def ask_shutdown(self) -> None:
        """Ask the guest to power off; where it cannot hear us, the ladder's next rungs do it."""
        try:
            async with asyncio.timeout(SHUTDOWN_ASK_TIMEOUT):
                await self.channel.shutdown()
        except (QvmError, TimeoutError, ConnectionError) as error:
            log.warning("the agent was not asked to shut down: %s", error)

    def forwards(self) -> list[dict[str, Any]]:
        return [dict(entry) for entry in self._forwarder.status()]

    def sockets(self) -> dict[str, str]:
        return {forwarder.host_path.stem: str(forwarder.host_path) for forwarder in self._sockets}

    async def close(self) -> None:
        for forwarder in self._sockets:
            await forwarder.close()
        self._sockets = []
        await self._forwarder.close()
        await self.streams.close()
        await self.channel.close()

"""What runtimes show to the host while a machine is up: sockets, ports, contexts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qvm.errors import InstanceStateError, QvmError
from qvm.filenames import Files
from qvm.guest.hostports import HostPortForwarder
from qvm.instance.record import read_json, write_json
from qvm.log import get_logger
from qvm.runtime.base import RuntimeContext
from qvm.runtime.stack import Stack
from qvm.supervisor.link import GuestLink
from qvm.wait import backoff

log = get_logger(__name__)


class Publishing:
    """Of one machine that is up; `open` once it is ready, `close` when it goes."""

    def __init__(self, files: Files, runtime: Stack, context: RuntimeContext, link: GuestLink) -> None:
        self.runtime = runtime
        self.context = context
        self._files = files
        self._link = link
        self._ports: list[HostPortForwarder] = []
        self._watching: asyncio.Task[None] | None = None

    async def open(self, tell: Callable[[str], None], *, switch: bool) -> None:
        """Open sockets and ports, then publish contexts (the current ones where `switch`). PortTakenError."""
        await self._link.open_sockets(self.runtime.sockets)
        await self._publish(tell, switch=switch)

    async def renew(
        self, runtime: Stack, context: RuntimeContext, tell: Callable[[str], None], *, switch: bool
    ) -> None:
        """Publish what there is now: an add-on has come, gone, or has another identity."""
        await self.close()
        self._link.set_extra_listeners([])
        self.runtime, self.context = runtime, context
        await self._publish(tell, switch=switch)

    async def _publish(self, tell: Callable[[str], None], *, switch: bool) -> None:
        self._link.ignore_ports(self.runtime.private_ports)
        self._open_ports()
        for note in await asyncio.to_thread(self.runtime.activate, self.context, switch=switch) or ():
            tell(note)
        self._watching = asyncio.create_task(self._watch_ports(), name="ports of the runtime")

    def _open_ports(self) -> None:
        wanted = self.runtime.host_ports(self.context)
        if not wanted:
            return
        known = _load_ports(self._files)
        for entry in wanted:
            forwarder = HostPortForwarder(entry.name, entry.guest_port, self._link.dialer)
            known[entry.name] = forwarder.start(wish=entry.wish, last=known.get(entry.name, 0))
            self._ports.append(forwarder)
        write_json(self._files.host_ports, {"version": 1, "ports": known})
        self._link.ignore_ports({entry.guest_port for entry in wanted})
        self.context = replace(self.context, host_ports=known)

    async def _watch_ports(self) -> None:
        """For as long as the machine is up; a runtime that is away for a while is asked again."""
        pauses = backoff(first=0.5, most=10.0)
        while True:
            try:
                await self.runtime.watch_ports(self._link.channel, self.context, self._link.set_extra_listeners)
                return
            except* (QvmError, OSError) as group:
                log.info("the runtime's ports are not watched: %s", "; ".join(map(str, group.exceptions)))
            await asyncio.sleep(next(pauses))

    def ports(self) -> dict[str, int]:
        return {forwarder.name: forwarder.port for forwarder in self._ports}

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None
        for forwarder in self._ports:
            await forwarder.close()
        self._ports = []


def _load_ports(files: Files) -> dict[str, int]:
    """Name -> the number it had last."""
    try:
        document: dict[str, Any] = read_json(files.host_ports) or {}
    except InstanceStateError:
        return {}  # a damaged file only costs the numbers
    return {str(name): int(port) for name, port in document.get("ports", {}).items()}


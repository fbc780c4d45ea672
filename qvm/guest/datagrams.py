"""UDP between a socket of the host and one in the guest, over the agent: a flow for each sender, ended by silence."""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from typing import Any

from qvm.errors import QvmError
from qvm.guest.dial import Datagrams
from qvm.log import get_logger

log = get_logger(__name__)

IDLE = 60.0
"""Seconds without a datagram after which a flow is forgotten, as NATs do it (RFC 4787 asks for no less than 30)."""
MAX_FLOWS = 512
"""Senders at once; beyond, the one that has been silent for longest goes."""
MAX_QUEUE = 128
"""Datagrams of one sender that wait for their way into the guest; what comes more is dropped."""
MAX_DATAGRAM = 65535
READ_AT_ONCE = 64

Address = Any
"""As the socket module has it: (host, port) or (host, port, flow, scope)."""


class DatagramRelay:
    """Serves one bound UDP socket until `close`."""

    def __init__(self, sock: socket.socket, dial: Callable[[], Awaitable[Datagrams]], *, name: str) -> None:
        self._sock = sock
        self._dial = dial
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._flows: OrderedDict[Address, _Flow] = OrderedDict()
        self._ending: set[asyncio.Task[None]] = set()
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._read)

    def _read(self) -> None:
        for _ in range(READ_AT_ONCE):
            try:
                data, sender = self._sock.recvfrom(MAX_DATAGRAM)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:  # the ICMP answer to something we have sent: somebody has gone
                log.debug("%s: %s", self._name, error)
                continue
            self._flow(sender).push(data)

    def _flow(self, sender: Address) -> _Flow:
        flow = self._flows.get(sender)
        if flow is None:
            while len(self._flows) >= MAX_FLOWS:
                self._flows.popitem(last=False)[1].task.cancel()
            flow = self._flows[sender] = _Flow()
            flow.task = asyncio.create_task(self._serve(sender, flow), name=f"{self._name} from {sender}")
            self._ending.add(flow.task)
            flow.task.add_done_callback(self._ending.discard)
        self._flows.move_to_end(sender)
        return flow

    async def _serve(self, sender: Address, flow: _Flow) -> None:
        try:
            way = await self._dial()
            upward = asyncio.create_task(flow.send_all(way))
            try:
                await self._receive(way, sender, flow)
            finally:
                upward.cancel()
                await asyncio.gather(upward, return_exceptions=True)
                await way.close()
        except QvmError as error:
            log.info("%s: %s", self._name, error)
        finally:
            if self._flows.get(sender) is flow:
                del self._flows[sender]

    async def _receive(self, way: Datagrams, sender: Address, flow: _Flow) -> None:
        while True:
            try:
                async with asyncio.timeout_at(flow.used + IDLE):
                    data = await way.recv_message()
            except TimeoutError:
                if self._loop.time() - flow.used >= IDLE:
                    return
                continue
            flow.used = self._loop.time()
            try:
                self._sock.sendto(data, sender)
            except OSError as error:  # full, or the sender has gone: datagrams may be lost
                log.debug("%s: %s", self._name, error)

    @property
    def flows(self) -> int:
        """Senders that are remembered."""
        return len(self._flows)

    def close(self) -> None:
        """Frees the address before it returns. Idempotent."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
        for task in self._ending:
            task.cancel()
        self._flows.clear()


class _Flow:
    """What one sender has sent and is not yet on its way."""

    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.used = asyncio.get_running_loop().time()
        self._queue: deque[bytes] = deque()
        self._filled = asyncio.Event()

    def push(self, data: bytes) -> None:
        self.used = asyncio.get_running_loop().time()
        if len(self._queue) < MAX_QUEUE:
            self._queue.append(data)
            self._filled.set()

    async def send_all(self, way: Datagrams) -> None:
        while True:
            await self._filled.wait()
            while self._queue:
                await way.send_message(self._queue.popleft())
            self._filled.clear()

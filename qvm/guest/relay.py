"""Bytes between a host socket and a connection in the guest, both ways, until both sides have ended.

Nothing is buffered here beyond one piece each way: a slow reader holds up its writer through the kernel's buffers
and the connection's own flow control. Plain sockets rather than asyncio streams, which would add a buffer and a copy.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import Awaitable, Callable

from qvm.errors import QvmError
from qvm.guest.dial import Connection
from qvm.log import get_logger

log = get_logger(__name__)

PIECE = 256 * 1024
BACKLOG = 512
# A process out of file descriptors gets them back as connections end; until then accept() would fail in a tight loop.
PAUSE_WITHOUT_DESCRIPTORS = 0.1
_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
ACCEPT_AT_ONCE = 64

Dial = Callable[[], Awaitable[Connection]]


async def relay(sock: socket.socket, connection: Connection) -> None:
    """Pump until both directions have ended; takes over both ends and closes them whatever happens.

    A half that ends is passed on as such (shutdown), so a protocol that says "end of input" and awaits an answer
    works. Where one side breaks, the other sees a reset and not an orderly end. Raises nothing but cancellation.
    """
    upward = asyncio.create_task(_pump_to_guest(sock, connection))
    try:
        await _pump_to_host(sock, connection)
        await upward
    except (QvmError, OSError) as error:
        log.debug("connection broke: %s", error)
        reset_on_close(sock)
    except asyncio.CancelledError:
        reset_on_close(sock)
        raise
    finally:
        if not upward.done():
            upward.cancel()
        await asyncio.gather(upward, return_exceptions=True)
        sock.close()
        await connection.close()


async def _pump_to_guest(sock: socket.socket, connection: Connection) -> None:
    loop = asyncio.get_running_loop()
    try:
        while data := await loop.sock_recv(sock, PIECE):
            await connection.send(data)
        await connection.send_eof()
    except (QvmError, OSError):
        # The other direction may wait for bytes that never come: breaking the connection wakes it.
        await connection.close()
        raise


async def _pump_to_host(sock: socket.socket, connection: Connection) -> None:
    loop = asyncio.get_running_loop()
    while data := await connection.recv(PIECE):
        await loop.sock_sendall(sock, data)
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # macOS says so where the peer has closed already
            raise


def reset_on_close(sock: socket.socket) -> None:
    """Let close() send a reset where the protocol has one (TCP; SO_LINGER of 0 seconds, socket(7))."""
    if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Relays:
    """The connections under way of one forwarder: accepted on the host, relayed to what `dial` opens in the guest."""

    def __init__(self) -> None:
        self._connections: set[asyncio.Task[None]] = set()

    def serve(self, sock: socket.socket, dial: Dial, *, name: str) -> Listener:
        """Accept on a listening socket until the returned listener is closed; connections live on."""
        return Listener(sock, lambda accepted: self._begin(accepted, dial, name), name=name)

    def _begin(self, sock: socket.socket, dial: Dial, name: str) -> None:
        task = asyncio.create_task(_handle(sock, dial, name))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        task.add_done_callback(lambda _: sock.close())  # also where it was cancelled before its first step

    @property
    def count(self) -> int:
        """Connections under way."""
        return len(self._connections)

    async def close(self) -> None:
        """Break all connections under way."""
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Listener:
    """Accepts on one socket. `close` frees the address before it returns, so it can be bound again at once."""

    def __init__(self, sock: socket.socket, on_accept: Callable[[socket.socket], None], *, name: str) -> None:
        self._sock = sock
        self._on_accept = on_accept
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        sock.setblocking(False)
        self._listen()

    def _listen(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _OUT_OF_RESOURCES:
                    log.warning("%s: cannot accept: %s", self._name, error.strerror)
                    self._loop.remove_reader(self._sock.fileno())
                    self._pause = self._loop.call_later(PAUSE_WITHOUT_DESCRIPTORS, self._listen)
                return  # anything else concerns one connection that went away in the queue (accept(2))
            sock.setblocking(False)
            self._on_accept(sock)

    def close(self) -> None:
        """Idempotent."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()


async def _handle(sock: socket.socket, dial: Dial, name: str) -> None:
    try:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = await dial()
    except (QvmError, OSError) as error:
        log.info("%s: the guest refused: %s", name, error)
        reset_on_close(sock)
        sock.close()
        return
    except BaseException:
        reset_on_close(sock)
        sock.close()
        raise
    await relay(sock, connection)

"""One SSH channel as a `qvm.guest.dial.Connection`, fed by the transport's thread and read in the event loop.

Imports paramiko: import this module only where a connection is about to be made.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from typing import Any

from paramiko.common import MSG_CHANNEL_CLOSE, MSG_CHANNEL_DATA, MSG_CHANNEL_EOF, MSG_CHANNEL_WINDOW_ADJUST
from paramiko.message import Message

from qvm.errors import GuestError
from qvm.guest.sshwire import (
    PACKET_OVERHEAD,
    WINDOW,
    Channel,
    Notice,
    StreamTransport,
    call_in_loop,
    fail,
    forget_outcome,
    resolve,
)

SEND_PIECE = 256 * 1024


class SshStream:
    """One channel as a `qvm.guest.dial.Connection`. Lives in the event loop; only `post` is called from outside."""

    def __init__(self, transport: StreamTransport, what: str) -> None:
        self.channel: Channel | None = None
        self._transport = transport
        self._what = what
        self._opened: asyncio.Future[None] = transport.loop.create_future()
        self._notices: deque[tuple[Notice, Any]] = deque()
        self._scheduled = False
        self._pieces: deque[bytes] = deque()
        self._window = 0
        self._packet = 0
        self._unacknowledged = 0
        self._is_open = False
        self._eof_received = False
        self._eof_sent = False
        self._peer_closed = False
        self._broken: str | None = None
        self._closed = False
        self._changed: set[asyncio.Future[None]] = set()

    async def open(self, kind: str, target: tuple[str | int, ...], *, timeout: float) -> None:
        """GuestError where the guest refuses or does not answer in `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._transport.submit(lambda: self._transport.open_stream(self, kind, target))
                await self._opened
        except TimeoutError:
            await self.close()
            raise GuestError(f"the guest did not open {self._what} within {timeout:g} s") from None
        except BaseException:
            await self.close()
            raise

    # -- from the transport's thread --

    def post(self, kind: Notice, value: Any) -> None:
        self._notices.append((kind, value))
        if not self._scheduled:
            self._scheduled = True
            call_in_loop(self._transport.loop, self._take_notices)

    # -- in the loop --

    def _take_notices(self) -> None:
        self._scheduled = False  # before looking: a notice that comes now schedules another look
        while self._notices:
            kind, value = self._notices.popleft()
            if kind is Notice.DATA:
                if not self._closed:
                    self._pieces.append(value)
            elif kind is Notice.WINDOW:
                self._window += value
            elif kind is Notice.EOF:
                self._eof_received = True
            elif kind is Notice.CLOSED:
                self._take_close(value)
            elif kind is Notice.OPENED:
                self._is_open = True
                self._window, self._packet = value[0], value[1] - PACKET_OVERHEAD
                resolve(self._opened)
                if self._closed:
                    self._send_close()
            else:
                self._peer_closed = self._closed = True
                fail(self._opened, GuestError(f"the guest refused {self._what}: {value}"))
        for waiter in self._changed:
            resolve(waiter)

    def _take_close(self, reason: str | None) -> None:
        if self._peer_closed:
            return
        self._peer_closed = True
        if reason or not self._eof_received:
            self._broken = reason or f"the guest reset {self._what}"
        fail(self._opened, GuestError(f"the guest refused {self._what}: {self._broken}"))
        if not self._closed and reason is None:
            self._send_close()
        if self.channel is not None:
            self._transport.forget(self.channel.chanid)

    async def _change(self) -> None:
        waiter: asyncio.Future[None] = self._transport.loop.create_future()
        self._changed.add(waiter)
        try:
            await waiter
        finally:
            self._changed.discard(waiter)

    async def recv(self, limit: int = 256 * 1024) -> bytes:
        while not self._pieces:
            if self._broken or self._closed:
                raise GuestError(self._broken or f"{self._what} is closed")
            if self._eof_received:
                return b""
            await self._change()
        data = self._take(limit)
        self._unacknowledged += len(data)
        if self._unacknowledged >= WINDOW // 8 and not (self._eof_received or self._peer_closed):
            amount, self._unacknowledged = self._unacknowledged, 0
            self._submit(MSG_CHANNEL_WINDOW_ADJUST, amount)
        return data

    def _take(self, limit: int) -> bytes:
        """Up to `limit` bytes of what has come, joined: sshd sends pieces of 32 KiB."""
        taken: list[bytes] = []
        while self._pieces and limit > 0:
            piece = self._pieces.popleft()
            if len(piece) > limit:
                self._pieces.appendleft(piece[limit:])
                piece = piece[:limit]
            taken.append(piece)
            limit -= len(piece)
        return taken[0] if len(taken) == 1 else b"".join(taken)

    async def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            if self._broken or self._peer_closed or self._closed:
                raise GuestError(self._broken or f"the guest has closed {self._what}")
            if self._window == 0:
                await self._change()
                continue
            size = min(len(rest), self._window, SEND_PIECE)
            self._window -= size
            piece, rest = rest[:size], rest[size:]
            await self._transport.submit(partial(self._send_data, piece))

    def _send_data(self, piece: memoryview) -> None:
        """In the sender thread."""
        for start in range(0, len(piece), self._packet):
            self._transport.send_message(self._message(MSG_CHANNEL_DATA, bytes(piece[start:start + self._packet])))

    async def send_eof(self) -> None:
        if not (self._eof_sent or self._peer_closed or self._closed):
            self._eof_sent = True
            await self._submit(MSG_CHANNEL_EOF)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._pieces.clear()
        if self._is_open and not self._peer_closed:
            self._send_close()
        self._opened.cancel()
        for waiter in self._changed:
            resolve(waiter)

    def _send_close(self) -> None:
        self._submit(MSG_CHANNEL_CLOSE)

    def _submit(self, kind: int, number: int | None = None) -> asyncio.Future[None]:
        done = self._transport.submit(lambda: self._transport.send_message(self._message(kind, number)))
        done.add_done_callback(forget_outcome)  # where nobody waits: a broken connection tells its streams by itself
        return done

    def _message(self, kind: int, value: int | bytes | None = None) -> Message:
        assert self.channel is not None
        message = Message()
        message.add_byte(bytes([kind]))
        message.add_int(self.channel.remote_chanid)
        if isinstance(value, int):
            message.add_int(value)
        elif value is not None:
            message.add_string(value)
        return message

"""Byte streams to sockets in the guest over one virtio-serial port; `qvm.guest.protocol` describes the frames."""

from __future__ import annotations

import asyncio
import os
import secrets
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from qvm.errors import DeadlineError, GuestError
from qvm.guest.protocol import (
    CREDIT,
    DATA,
    EOF,
    FAILED,
    MARKER_SIZE,
    MAX_FRAME,
    OPEN,
    OPENED,
    RESET,
    STREAM_WINDOW,
    FrameParser,
    encode_frame,
)
from qvm.log import get_logger

_log = get_logger(__name__)
_OPEN_TIMEOUT = 60.0
"""Seconds until the guest must have said whether a connection was made; TCP in it may retry for long."""
_CREDIT_STEP = STREAM_WINDOW // 4


class Sessions(Protocol):
    """What the streams need of the control channel (`AgentChannel`)."""

    session_hooks: list[Callable[[], Awaitable[None]]]

    async def begin_streams(self, marker: bytes) -> None: ...


class MuxStream:
    """One connection to a guest socket; a `qvm.guest.dial.Connection`."""

    def __init__(self, mux: StreamMux, number: int) -> None:
        self._mux = mux
        self.number = number
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._input: deque[bytes] = deque()
        self._input_end = False
        self._output_end = False
        self._error: GuestError | None = None
        self._credit = 0
        self._owed = 0
        self._readable = asyncio.Event()
        self._sendable = asyncio.Event()

    async def recv(self, limit: int = 256 * 1024) -> bytes:
        while not self._input:
            if self._error is not None:
                raise self._error
            if self._input_end:
                return b""
            self._readable.clear()
            await self._readable.wait()
        parts = [self._input.popleft()]
        size = len(parts[0])
        while self._input and size + len(self._input[0]) <= limit:
            parts.append(self._input.popleft())
            size += len(parts[-1])
        data = b"".join(parts)
        if size > limit:
            self._input.appendleft(data[limit:])
            data = data[:limit]
        self._owe(len(data))
        return data

    def _owe(self, size: int) -> None:
        """Tell the guest, now and then, what has been taken."""
        self._owed += size
        if self._owed >= _CREDIT_STEP and not self._input_end and self._error is None:
            self._mux.write(encode_frame(self.number, CREDIT, struct.pack(">I", self._owed)))
            self._owed = 0

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if self._error is not None:
                raise self._error
            if self._output_end:
                raise GuestError("the connection's output was ended already")
            if self._credit <= 0:
                self._sendable.clear()
                await self._sendable.wait()
                continue
            piece = view[: min(MAX_FRAME, self._credit)]
            self._credit -= len(piece)
            self._mux.write(encode_frame(self.number, DATA, bytes(piece)))
            view = view[len(piece) :]
            await self._mux.writable()

    async def recv_message(self) -> bytes:
        """One datagram, of a stream to a UDP socket."""
        while not self._input:
            if self._error is not None or self._input_end:
                raise self._error or GuestError("the guest has closed the socket")
            self._readable.clear()
            await self._readable.wait()
        data = self._input.popleft()
        self._owe(len(data))
        return data

    async def send_message(self, data: bytes) -> None:
        """One datagram; lost where the guest has not taken those before it."""
        if self._error is not None:
            raise self._error
        if len(data) <= min(self._credit, MAX_FRAME):
            self._credit -= len(data)
            self._mux.write(encode_frame(self.number, DATA, data))
            await self._mux.writable()

    async def send_eof(self) -> None:
        if not self._output_end and self._error is None:
            self._output_end = True
            self._mux.write(encode_frame(self.number, EOF))
            self._forget_if_over()

    async def close(self) -> None:
        if self._error is None:
            over = self._input_end and self._output_end
            self.fail(GuestError("the connection was closed"))
            if not over and self._mux.live:
                self._mux.write(encode_frame(self.number, RESET))
        self._input.clear()

    def on_frame(self, kind: int, payload: bytes) -> None:
        if kind == DATA:
            self._input.append(payload)
            self._readable.set()
        elif kind == CREDIT:
            self._credit += struct.unpack(">I", payload)[0]
            self._sendable.set()
        elif kind == OPENED:
            self._credit += struct.unpack(">I", payload)[0]
            if not self.opened.done():
                self.opened.set_result(None)
        elif kind == EOF:
            self._input_end = True
            self._readable.set()
            self._forget_if_over()
        elif kind == FAILED:
            self.fail(GuestError(f"the guest could not connect: {payload.decode(errors='replace')}"))
        else:
            self.fail(GuestError(f"the guest reset the connection: {payload.decode(errors='replace')}"))

    def fail(self, error: GuestError) -> None:
        """The stream is over; what was received can still be read."""
        self._error = self._error or error
        self._mux.forget(self.number)
        if not self.opened.done():
            self.opened.set_exception(self._error)
            self.opened.exception()
        self._readable.set()
        self._sendable.set()

    def _forget_if_over(self) -> None:
        if self._input_end and self._output_end:
            self._mux.forget(self.number)


class MuxListener:
    """A socket that listens in the guest; a `qvm.guest.dial.GuestListener`."""

    def __init__(self, mux: StreamMux, stream: MuxStream) -> None:
        self._mux = mux
        self._stream = stream

    async def accept(self) -> MuxStream:
        while True:
            if not await self._stream.recv(1):
                raise GuestError("the guest listens no more")
            try:
                return await self._mux.open(f"accept:{self._stream.number}")
            except GuestError as error:  # whoever it was has gone again; where the listener has, the next look says so
                _log.debug("%s", error)

    async def close(self) -> None:
        await self._stream.close()


class StreamMux(asyncio.Protocol):
    """Opens any number of connections in the guest; a `qvm.guest.dial.Dialer`, DatagramDialer and GuestBinder.

    Begin with `connect` after the channel's `hello`. When the agent starts anew, streams that were open fail and new
    ones can be opened as soon as the channel has its new session.
    """

    def __init__(self, channel: Sessions) -> None:
        self.live = False
        self._channel = channel
        self._streams: dict[int, MuxStream] = {}
        self._number = 0
        self._transport: asyncio.Transport | None = None
        self._parser: FrameParser | None = None
        self._begun: asyncio.Future[None] | None = None
        self._writable = asyncio.Event()
        self._writable.set()

    async def connect(self, path: Path, *, timeout: float = 60.0) -> None:
        """Connect to QEMU's socket of the stream port and begin. GuestError, DeadlineError."""
        loop = asyncio.get_running_loop()
        try:
            self._transport, _ = await loop.create_unix_connection(lambda: self, os.fspath(path))
        except OSError as error:
            raise GuestError(f"cannot reach the stream socket {path}: {error.strerror or error}") from error
        self._transport.set_write_buffer_limits(high=1 << 20)
        await self._begin(timeout)
        self._channel.session_hooks.append(self._begin_again)

    async def open_tcp(self, host: str, port: int) -> MuxStream:
        """`host` is an address (or localhost): names are not looked up in the guest."""
        return await self.open(f"tcp:{host}:{port}")

    async def open_unix(self, path: str) -> MuxStream:
        return await self.open(f"unix:{path}")

    async def open_udp(self, host: str, port: int) -> MuxStream:
        return await self.open(f"udp:{host}:{port}")

    async def listen_tcp(self, host: str, port: int) -> MuxListener:
        return MuxListener(self, await self.open(f"listen:tcp:{host}:{port}"))

    async def listen_unix(self, path: str) -> MuxListener:
        return MuxListener(self, await self.open(f"listen:unix:{path}"))

    async def close(self) -> None:
        """Break every stream and let go of the port. Idempotent, raises nothing."""
        if self._begin_again in self._channel.session_hooks:
            self._channel.session_hooks.remove(self._begin_again)
        for stream in list(self._streams.values()):
            await stream.close()
        self._lose("the streams were closed")
        if self._transport is not None:
            self._transport.close()

    async def _begin(self, timeout: float) -> None:
        marker = secrets.token_bytes(MARKER_SIZE)
        self._lose("the guest's agent was restarted")
        self._parser = FrameParser(marker)
        self._begun = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                await self._channel.begin_streams(marker)
                self.write(marker)
                await self._begun
        except TimeoutError:
            raise DeadlineError(f"the stream port did not answer within {timeout:g} s") from None

    async def _begin_again(self) -> None:
        await self._begin(_OPEN_TIMEOUT)

    async def open(self, target: str) -> MuxStream:
        """`target` as `qvm.guest.protocol` has it."""
        if not self.live:
            raise GuestError("the streams to the guest are not open")
        self._number += 1
        number = self._number
        stream = self._streams[number] = MuxStream(self, number)
        self.write(encode_frame(number, OPEN, struct.pack(">I", STREAM_WINDOW) + target.encode()))
        try:
            async with asyncio.timeout(_OPEN_TIMEOUT):
                await stream.opened
        except TimeoutError:
            await stream.close()
            raise DeadlineError(f"{target} in the guest did not answer within {_OPEN_TIMEOUT:g} s") from None
        except asyncio.CancelledError:
            await stream.close()
            raise
        return stream

    # For the streams.

    def write(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            raise GuestError("the streams to the guest are closed")
        self._transport.write(data)

    async def writable(self) -> None:
        """Waits while the port takes nothing more."""
        await self._writable.wait()

    def forget(self, number: int) -> None:
        self._streams.pop(number, None)

    # asyncio.Protocol.

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            return
        try:
            for number, kind, payload in self._parser.feed(data):
                stream = self._streams.get(number)
                if stream is not None:
                    stream.on_frame(kind, payload)
        except (ValueError, struct.error) as error:
            _log.error("the stream port sent no frames: %s", error)
            self._lose(f"the stream port is out of step ({error})")
            return
        if self._parser.begun and self._begun is not None and not self._begun.done():
            self.live = True
            self._begun.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose("QEMU closed the stream port")
        self._writable.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _lose(self, why: str) -> None:
        self.live = False
        error = GuestError(why)
        for stream in list(self._streams.values()):
            stream.fail(error)
        if self._begun is not None and not self._begun.done():
            self._begun.set_exception(error)
            self._begun.exception()

"""SSH channels as asyncio byte streams, on top of paramiko's Transport.

paramiko gives each channel a blocking socket-like face, which would cost a thread per connection, and knows no
forwarding to unix sockets. Here its transport thread hands arriving messages straight to the event loop, one sender
thread writes, and `direct-streamlocal@openssh.com` (OpenSSH's PROTOCOL, section 2.4) is one more kind of channel.

Imports paramiko (some 200 ms): import this module only where a connection is about to be made.
"""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Protocol

import paramiko
from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_OPEN,
    MSG_CHANNEL_WINDOW_ADJUST,
    MSG_GLOBAL_REQUEST,
)
from paramiko.message import Message
from paramiko.packet import Packetizer

from qvm.errors import GuestError
from qvm.log import get_logger

log = get_logger(__name__)

WINDOW = 8 * 1024 * 1024
MAX_PACKET = 256 * 1024
# Room for the message's own header inside a packet; the number is paramiko's (Channel._wait_for_send_window).
PACKET_OVERHEAD = 64
# AES's bound for one key is 2^32 blocks (RFC 4344, section 3.2); paramiko would exchange keys every 512 MiB.
REKEY_BYTES = 2**34
# Authenticated encryption in one OpenSSL call is the fastest paramiko has; the rest is for older servers.
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes256-ctr")
# Plain X25519: an emulated guest pays for every handshake, and the connection never leaves the machine.
KEX = ("curve25519-sha256@libssh.org", "curve25519-sha256", "ecdh-sha2-nistp256")


class Notice(Enum):
    """What the transport's thread tells a stream, with its value."""

    OPENED = auto()
    """(window, packet size) for what we send, in bytes"""
    REFUSED = auto()
    """the reason"""
    DATA = auto()
    """bytes"""
    WINDOW = auto()
    """bytes we may send beyond what we might so far"""
    EOF = auto()
    CLOSED = auto()
    """None, or the reason where the whole connection ended"""


class Sink(Protocol):
    """What a channel feeds; `post` is called from the transport's thread."""

    channel: Channel | None

    def post(self, kind: Notice, value: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class _Job:
    work: Callable[[], None]
    done: asyncio.Future[None]


class _StampingPacketizer(Packetizer):
    """Remembers when the peer was last heard."""

    REKEY_BYTES = REKEY_BYTES
    heard = 0.0

    def read_message(self) -> tuple[int, Message]:
        message = super().read_message()
        self.heard = time.monotonic()
        return message


class Channel(paramiko.Channel):
    """A channel that keeps nothing: what arrives goes to its stream. All methods run in the transport's thread."""

    def __init__(self, chanid: int, stream: Sink) -> None:
        super().__init__(chanid)
        self.stream = stream

    def take_data(self, message: Message) -> None:
        self.stream.post(Notice.DATA, message.get_binary())

    def take_window(self, message: Message) -> None:
        self.stream.post(Notice.WINDOW, message.get_int())

    def take_eof(self, message: Message) -> None:
        self.stream.post(Notice.EOF, None)

    def take_close(self, message: Message) -> None:
        self.stream.post(Notice.CLOSED, None)

    def _set_closed(self) -> None:
        """The transport died (paramiko's Channel._unlink)."""
        super()._set_closed()  # type: ignore[misc]  # missing in the stubs
        self.stream.post(Notice.CLOSED, "the SSH connection broke")

    def __del__(self) -> None:
        """paramiko would send a CLOSE from whatever thread collects the garbage; the stream has sent its own."""


class _Opening:
    """Stands where paramiko keeps a threading.Event for a channel being opened."""

    def __init__(self, transport: StreamTransport, channel: Channel) -> None:
        self._transport = transport
        self._channel = channel

    def set(self) -> None:
        """Called by the transport's thread on the server's answer, right after it has stored what the answer was."""
        channel = self._channel
        if self._transport.is_open(channel.chanid):
            channel.stream.post(Notice.OPENED, (channel.out_window_size, channel.out_max_packet_size))
            return
        error = self._transport.saved_exception
        reason = error.text if isinstance(error, paramiko.ChannelException) else "the SSH connection broke"
        self._transport.forget(channel.chanid)
        channel.stream.post(Notice.REFUSED, reason)


class StreamTransport(paramiko.Transport):
    """A client Transport whose channels are asyncio streams, with one thread that sends for all of them."""

    _channel_handler_table = {  # noqa: RUF012  # paramiko's own name and type
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]  # missing in the stubs
        MSG_CHANNEL_DATA: Channel.take_data,
        MSG_CHANNEL_WINDOW_ADJUST: Channel.take_window,
        MSG_CHANNEL_EOF: Channel.take_eof,
        MSG_CHANNEL_CLOSE: Channel.take_close,
    }

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(sock, default_window_size=WINDOW, default_max_packet_size=MAX_PACKET,
                         packetizer_class=_StampingPacketizer)
        self.loop = loop
        self.ended: asyncio.Future[None] = loop.create_future()
        self._open: dict[int, Channel] = {}
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._sender_ended = False
        self.set_log_channel("qvm.paramiko")
        options = self.get_security_options()
        options.ciphers = [name for name in CIPHERS if name in options.ciphers]
        options.kex = [name for name in KEX if name in options.kex]
        options.key_types = ["ssh-ed25519"]
        threading.Thread(target=self._send_jobs, name="qvm ssh sender", daemon=True).start()

    @property
    def silence(self) -> float:
        """Seconds since the peer was last heard."""
        assert isinstance(self.packetizer, _StampingPacketizer)
        return time.monotonic() - self.packetizer.heard

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._jobs.put(None)
            call_in_loop(self.loop, resolve, self.ended)

    def abort(self) -> None:
        """Break the connection and end both threads, also one that never got as far as being active."""
        self.close()
        self.sock.close()
        self._jobs.put(None)

    def is_open(self, chanid: int) -> bool:
        return self._channels.get(chanid) is not None  # type: ignore[attr-defined]  # missing in the stubs

    def forget(self, chanid: int) -> None:
        """Both sides have closed this channel. paramiko itself never forgets one, which adds up over many."""
        self._open.pop(chanid, None)
        self._unlink_channel(chanid)  # type: ignore[attr-defined]  # missing in the stubs
        self.channels_seen.pop(chanid, None)

    def submit(self, work: Callable[[], None]) -> asyncio.Future[None]:
        """Run `work` in the sender thread (sending may block); the future carries its end, or GuestError."""
        job = _Job(work, self.loop.create_future())
        self._jobs.put(job)
        if self._sender_ended:
            self._refuse_jobs()
        return job.done

    def _send_jobs(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.work()
            except Exception as error:  # a job must not end the thread; its waiter gets the reason
                call_in_loop(self.loop, fail, job.done, GuestError(f"the SSH connection broke: {error}"))
            else:
                call_in_loop(self.loop, resolve, job.done)
        self._sender_ended = True
        self._refuse_jobs()

    def _refuse_jobs(self) -> None:
        """What was submitted as the sender ended; both sides look, so none is left behind."""
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is not None:
                call_in_loop(self.loop, fail, job.done, GuestError("the SSH connection ended"))

    def send_message(self, message: Message) -> None:
        """For jobs only. Messages for a dead transport are dropped: its streams hear of its end by themselves."""
        self._send_user_message(message)  # type: ignore[attr-defined]  # missing in the stubs

    def open_stream(self, stream: Sink, kind: str, target: tuple[str | int, ...]) -> None:
        """For jobs only: ask for a channel. As Transport.open_channel, which cannot express other kinds."""
        message = Message()
        message.add_byte(bytes([MSG_CHANNEL_OPEN]))
        message.add_string(kind)
        with self.lock:
            chanid = self._next_channel()  # type: ignore[attr-defined]  # missing in the stubs
            channel = Channel(chanid, stream)
            stream.channel = channel
            self._open[chanid] = channel
            self._channels.put(chanid, channel)  # type: ignore[attr-defined]  # missing in the stubs
            self.channel_events[chanid] = _Opening(self, channel)  # type: ignore[assignment]  # has the one method used
            self.channels_seen[chanid] = True
            channel._set_transport(self)  # type: ignore[attr-defined]  # missing in the stubs
            channel._set_window(WINDOW, MAX_PACKET)  # type: ignore[attr-defined]  # missing in the stubs
        for number in (chanid, WINDOW, MAX_PACKET):
            message.add_int(number)
        for part in target:
            if isinstance(part, int):
                message.add_int(part)
            else:
                message.add_string(part)
        self.send_message(message)
        if not self.is_active():
            stream.post(Notice.REFUSED, "the SSH connection broke")

    def send_keepalive(self) -> None:
        """For jobs only: a request every server answers, be it with a refusal (as OpenSSH's ServerAliveInterval)."""
        message = Message()
        message.add_byte(bytes([MSG_GLOBAL_REQUEST]))
        message.add_string("keepalive@openssh.com")
        message.add_boolean(True)
        self.send_message(message)


def call_in_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: object) -> None:
    """call_soon_threadsafe from a thread that may outlive the loop."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        log.debug("the event loop ended before its SSH connection")


def resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def fail(future: asyncio.Future[None], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def forget_outcome(future: asyncio.Future[None]) -> None:
    """For jobs whose failure needs no report, since streams and the watcher hear of a broken connection anyway."""
    if not future.cancelled():
        future.exception()

"""Streams that are no connections made for the host: datagrams, and sockets that listen in the guest for it."""

import _socket as socket
import _struct as struct
import errno
import os
import select
from _collections import deque

from .base import Failure
from .streams import CREDIT, DATA, OPENED, STREAM_WINDOW, Stream, parse_address

MAX_WAITING = 64  # accepted connections that the host has not asked for yet


class Datagrams(Stream):
    """A UDP socket that talks to one address: each frame of data is one datagram, and what does not fit is lost."""

    def take_socket(self, target):
        family, self.address = parse_address(target.partition(":")[2])
        self.socket = socket.socket(family, socket.SOCK_DGRAM)

    def on_frame(self, kind, payload):
        if kind != DATA:
            super().on_frame(kind, payload)
            return
        self.mux.frame(self.number, CREDIT, struct.pack(">I", len(payload)))
        try:
            self.socket.send(payload)
        except OSError:  # full, or nobody listens (any more): datagrams may be lost
            return

    def pull(self):
        if self.credit <= 0:
            return
        try:
            data = self.socket.recv(65535)
        except (BlockingIOError, ConnectionRefusedError):
            return
        if len(data) <= self.credit:
            self.credit -= len(data)
            self.mux.frame(self.number, DATA, data)

    def settle(self):
        if self.input_end:
            self.close()
        else:
            self.interest()


class Listening(Stream):
    """A socket that listens: the host gets a byte for each connection, and then asks for it by `accept:NUMBER`."""

    path = None

    def take_socket(self, target):
        kind, _, rest = target.partition(":")[2].partition(":")
        self.waiting = deque()
        if kind == "unix":
            self.listen_at_path(rest)
        elif kind == "tcp":
            family, address = parse_address(rest)
            self.socket = socket.socket(family)
            try:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                self.socket.bind(address)
            except OSError:
                self.socket.close()
                raise
        else:
            raise Failure(f"cannot listen at {target!r}")
        self.socket.listen(128)

    def listen_at_path(self, path):
        with_peer = socket.socket(socket.AF_UNIX)
        stale = with_peer.connect_ex(path) == errno.ECONNREFUSED
        with_peer.close()
        if stale:
            os.unlink(path)
        self.socket = socket.socket(socket.AF_UNIX)
        try:
            self.socket.bind(path)
        except OSError:
            self.socket.close()
            raise
        self.path = path
        os.chmod(path, 0o666)

    def connect(self):
        self.opened = True
        self.mux.frame(self.number, OPENED, struct.pack(">I", STREAM_WINDOW))
        self.interest()

    def interest(self):
        wanted = select.EPOLLIN if len(self.waiting) < MAX_WAITING else 0
        if wanted != self.mask:
            self.mask = wanted
            if wanted:
                self.mux.loop.watch(self.socket.fileno(), self.on_event, wanted, self.mux.sockets)
            else:
                self.mux.loop.unwatch(self.socket.fileno(), self.mux.sockets)

    def on_event(self, events):
        try:
            fd, _ = self.socket._accept()
        except OSError:  # it has gone again
            return
        self.waiting.append(socket.socket(fileno=fd))
        self.mux.frame(self.number, DATA, b"+")
        self.interest()

    def on_frame(self, kind, payload):
        if kind != CREDIT:
            self.close()

    def close(self):
        if self.path is not None and os.path.lexists(self.path):
            os.unlink(self.path)
        self.path = None
        while self.waiting:
            self.waiting.popleft().close()
        super().close()


class Accepted(Stream):
    """A connection that somebody in the guest has made to a `Listening` one."""

    def take_socket(self, target):
        listening = self.mux.streams.get(int(target.partition(":")[2]))
        if not isinstance(listening, Listening) or not listening.waiting:
            raise Failure("nobody waits there")
        self.socket = listening.waiting.popleft()
        listening.interest()

    def connect(self):
        self.interest()

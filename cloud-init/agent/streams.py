"""Byte streams from the host to sockets of the guest."""

import _socket as socket
import _struct as struct
import errno
import os
import select

from .base import CHUNK, Failure

STREAM_WINDOW = 512 << 10
OPEN, OPENED, FAILED, DATA, EOF, RESET, CREDIT = range(1, 8)
HEADER = struct.Struct(">IBI")


def parse_address(text):
    """ADDRESS:PORT as (family, what the socket module takes)."""
    host, _, port = text.rpartition(":")
    return socket.AF_INET6 if ":" in host else socket.AF_INET, ("127.0.0.1" if host == "localhost" else host, int(port))


class Stream:
    """One connection from the host to a socket in the guest."""

    def __init__(self, mux, number, credit, target):
        self.mux, self.number, self.credit = mux, number, credit
        self.input = bytearray()  # from the host, for the socket; never more than the credit we gave
        self.input_end = self.output_end = self.shut = False
        self.opened = False
        self.mask = 0
        self.take_socket(target)
        self.socket.setblocking(False)
        self.connect()

    def take_socket(self, target):
        kind, _, rest = target.partition(":")
        if kind == "unix":
            self.socket, self.address = socket.socket(socket.AF_UNIX), rest
        elif kind == "tcp":
            family, self.address = parse_address(rest)
            self.socket = socket.socket(family)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            raise Failure(f"unknown target {target!r}")

    def connect(self):
        number = self.socket.connect_ex(self.address)
        if number == errno.EAGAIN:  # a unix listener whose backlog is full: there is no event for that
            self.mux.retry.append(self)
        elif number not in (0, errno.EINPROGRESS):
            self.fail(number)
        else:
            self.interest()

    def fail(self, number):
        self.mux.frame(self.number, FAILED, os.strerror(number).encode())
        self.close()

    def interest(self):
        """Tell epoll what we wait for; nothing at all must be unregistered, or a hang-up would be told for ever."""
        mask = 0
        if self.input or not self.opened:
            mask |= select.EPOLLOUT
        if self.opened and self.credit > 0 and not self.output_end:
            mask |= select.EPOLLIN
        if mask != self.mask:
            self.mask = mask
            if mask:
                self.mux.loop.watch(self.socket.fileno(), self.on_event, mask, self.mux.sockets)
            else:
                self.mux.loop.unwatch(self.socket.fileno(), self.mux.sockets)

    def on_event(self, events):
        try:
            if not self.opened:
                number = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number:
                    return self.fail(number)
                self.opened = True
                self.mux.frame(self.number, OPENED, struct.pack(">I", STREAM_WINDOW))
            if self.input:
                self.push()
            if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                self.pull()
        except OSError as error:
            self.mux.frame(self.number, RESET, error.strerror.encode())
            self.close()
            return None
        return self.settle()

    def push(self):
        try:
            with memoryview(self.input) as view:
                sent = self.socket.send(view)
        except BlockingIOError:
            return
        del self.input[:sent]
        self.mux.frame(self.number, CREDIT, struct.pack(">I", sent))

    def pull(self):
        if self.output_end or self.credit <= 0 or not self.opened:
            return
        try:
            data = self.socket.recv(min(CHUNK, self.credit))
        except BlockingIOError:
            return
        if data:
            self.credit -= len(data)
            self.mux.frame(self.number, DATA, data)
        else:
            self.output_end = True
            self.mux.frame(self.number, EOF)

    def settle(self):
        if self.input_end and not self.input and not self.shut and self.opened:
            self.shut = True
            try:
                self.socket.shutdown(socket.SHUT_WR)
            except OSError:  # the peer is gone already; its end comes as EOF or a reset
                self.output_end = self.output_end or False
        if self.shut and self.output_end:
            self.close()
        else:
            self.interest()

    def on_frame(self, kind, payload):
        if kind == DATA:
            self.input += payload
            if self.opened:
                self.on_event(0)
        elif kind == EOF:
            self.input_end = True
            self.settle()
        elif kind == CREDIT:
            self.credit += struct.unpack(">I", payload)[0]
            self.interest()
        elif kind == RESET:
            # An unread input makes close() send a TCP reset, which is what the host's side had.
            self.close()

    def close(self):
        if self.mask:
            self.mux.loop.unwatch(self.socket.fileno(), self.mux.sockets)
            self.mask = 0
        self.socket.close()
        self.mux.streams.pop(self.number, None)

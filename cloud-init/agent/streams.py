"""Byte streams from the host to sockets of the guest."""

import _socket as socket
import _struct as struct
import errno
import os
import select

from .base import CHUNK, Failure, log

STREAM_WINDOW = 512 << 10
OPEN, OPENED, FAILED, DATA, EOF, RESET, CREDIT = range(1, 8)
HEADER = struct.Struct(">IBI")


class Stream:
    """One connection from the host to a socket in the guest."""

    def __init__(self, mux, number, credit, target):
        self.mux, self.number, self.credit = mux, number, credit
        self.input = bytearray()  # from the host, for the socket; never more than the credit we gave
        self.input_end = self.output_end = self.shut = False
        self.opened = False
        self.mask = 0
        kind, _, rest = target.partition(":")
        if kind == "unix":
            self.socket, self.address = socket.socket(socket.AF_UNIX), rest
        elif kind == "tcp":
            host, _, port = rest.rpartition(":")
            self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.address = ("127.0.0.1" if host == "localhost" else host, int(port))
        else:
            raise Failure(f"unknown target {target!r}")
        self.socket.setblocking(False)
        self.connect()

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


class Mux:
    """The stream port: frames to and from the host, one session at a time."""

    def __init__(self, loop, port):
        self.loop, self.port = loop, port
        self.sockets = loop.group()  # muted while the port is full
        self.streams = {}
        self.retry = []
        self.buffer = bytearray()
        self.marker = None  # bytes that begin the next session; everything before them belongs to an older one
        self.live = False

    def begin(self, marker):
        for stream in list(self.streams.values()):
            stream.close()
        self.retry.clear()
        self.buffer.clear()
        self.port.out.clear()
        self.marker, self.live = marker, False

    def frame(self, number, kind, payload=b""):
        self.port.out += HEADER.pack(number, kind, len(payload))
        self.port.out += payload

    def on_port(self, _events=0):
        self.buffer += self.port.read()
        if self.marker is not None:
            at = self.buffer.find(self.marker)
            if at < 0:
                del self.buffer[: -len(self.marker)]
                return
            del self.buffer[: at + len(self.marker)]
            self.port.out += self.marker
            self.marker, self.live = None, True
        if not self.live:
            self.buffer.clear()
            return
        at, end = 0, len(self.buffer)
        while end - at >= HEADER.size:
            number, kind, length = HEADER.unpack_from(self.buffer, at)
            if kind > CREDIT or length > STREAM_WINDOW:
                log("stream port: lost the frames; the host must begin anew")
                self.begin(None)
                return
            if end - at - HEADER.size < length:
                break
            start = at + HEADER.size
            at = start + length
            self.dispatch(number, kind, bytes(self.buffer[start:at]))
        del self.buffer[:at]

    def connect_again(self):
        waiting, self.retry = self.retry, []
        for stream in waiting:
            if self.streams.get(stream.number) is stream:
                stream.connect()

    def dispatch(self, number, kind, payload):
        if kind != OPEN:
            stream = self.streams.get(number)
            if stream is not None:
                stream.on_frame(kind, payload)
            return
        try:
            credit, target = struct.unpack_from(">I", payload)[0], payload[4:].decode()
            stream = self.streams[number] = Stream.__new__(Stream)
            stream.__init__(self, number, credit, target)
        except (OSError, Failure, ValueError) as error:
            self.streams.pop(number, None)
            self.frame(number, FAILED, str(error).encode())

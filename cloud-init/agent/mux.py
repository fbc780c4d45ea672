"""The stream port: many byte streams between the host and sockets of the guest."""

import _struct as struct

from .base import Failure, log
from .endpoints import Accepted, Datagrams, Listening
from .streams import CREDIT, FAILED, HEADER, OPEN, STREAM_WINDOW, Stream

KINDS = {"udp": Datagrams, "listen": Listening, "accept": Accepted}


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
            sort = KINDS.get(target.partition(":")[0], Stream)
            stream = self.streams[number] = sort.__new__(sort)
            stream.__init__(self, number, credit, target)
        except (OSError, Failure, ValueError) as error:
            self.streams.pop(number, None)
            self.frame(number, FAILED, str(error).encode())

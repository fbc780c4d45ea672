"""The control channel: JSON lines to and from the host, one session at a time (qvm/guest/protocol.py)."""

import _thread
import binascii
import time

from .base import unb64
from .jsontext import parse_json, to_json

MAX_LINE = 2 << 20  # a control message of 1 MiB in base64, with room for its frame
STDIN_MARK = b',"op":"stdin","data":"'


class Channel:
    """Hands each request to the first of `groups` that has a method `op_` and its name. What that returns is the
    answer; with None it answers later, by `send` or `answer_later`.
    """

    def __init__(self, loop, port):
        self.loop, self.port = loop, port
        self.groups = ()
        self.take_stdin = None  # called with a command's number and its input
        self.session = None
        self.lines = bytearray()
        self.arrived = 0  # when what is being read began to come, on the monotonic clock in ns
        self.uploads = {}

    def begin(self, nonce):
        """A new session: what was meant for an older one is dropped."""
        self.uploads.clear()
        self.port.out[:] = b"\n"
        self.session = nonce

    def announce(self, message):
        """To whoever listens already, session or not; without a host the line goes nowhere."""
        self.port.out += b"\n" + to_json(message) + b"\n"
        self.port.flush()
        self.port.out.clear()

    def send(self, message):
        """To the host, if there is one: without a session nobody would read it."""
        if self.session is not None:
            self.port.out += to_json(message) + b"\n"

    def send_output(self, number, name, data):
        """A command's output, as `send` would, without JSON's look at every letter: it may be gigabytes."""
        if self.session is not None:
            self.port.out += b'{"id":%d,"%s":"' % (number, name.encode())
            self.port.out += binascii.b2a_base64(data, newline=False)
            self.port.out += b'"}\n'

    def answer_later(self, number, function, *args):
        """Call what may block in a thread of its own; the dict that it returns, or None, is the answer."""
        def work():
            try:
                answer = {"id": number, "ok": True, **(function(*args) or {})}
            except Exception as error:
                answer = {"id": number, "error": f"{type(error).__name__}: {error}"}
            self.loop.post(self.send, answer)

        _thread.start_new_thread(work, ())

    def collect(self, message):
        """The whole of an upload that comes in several messages; None until its last."""
        parts = self.uploads.setdefault(message["id"], bytearray())
        parts += unb64(message["data"])
        if message.get("more"):
            return None
        return bytes(self.uploads.pop(message["id"]))

    def on_port(self, _events=0):
        if not self.lines:
            self.arrived = time.monotonic_ns()
        seen = len(self.lines)
        self.lines += self.port.read()
        while True:
            at = self.lines.find(b"\n", seen)
            if at < 0:
                break
            line = bytes(self.lines[:at])
            del self.lines[: at + 1]
            seen = 0
            if line.strip() and not self.pass_stdin(line):
                self.on_line(line)
        if len(self.lines) > MAX_LINE:
            self.lines.clear()
            self.send({"event": "garbage", "message": "a line longer than a message may be"})

    def pass_stdin(self, line):
        """A command's input in the one form the host writes it in, without parsing: it too may be gigabytes."""
        at = line.find(STDIN_MARK, 0, 40)
        if at < 0 or self.session is None or not (line.startswith(b'{"id":') and line.endswith(b'"}')):
            return False
        try:
            number, data = int(line[6:at]), unb64(memoryview(line)[at + len(STDIN_MARK) : -2])
        except ValueError:
            return False
        self.take_stdin(number, data)
        return True

    def find_operation(self, name):
        return next((found for group in self.groups if (found := getattr(group, "op_" + name, None))), None)

    def on_line(self, line):
        try:
            message = parse_json(line)
            operation = self.find_operation(message["op"])
        except (ValueError, KeyError, TypeError):
            self.send({"event": "garbage", "message": line[:80].decode(errors="replace")})
            return
        number = message.get("id")
        if operation is None:
            self.send({"id": number, "error": f"unknown operation {message['op']!r}"})
            return
        if self.session is None and message["op"] != "hello":
            return
        try:
            answer = operation(message)
        except Exception as error:  # a request that cannot be done must not end the agent
            answer = {"error": f"{type(error).__name__}: {error}"}
        if answer is not None:
            self.send({"id": number, **answer})

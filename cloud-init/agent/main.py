"""The agent as a whole: its ports, its sessions, its own replacement."""

import _thread
import os
import select
import sys
import time

from .base import Failure, sha256, unb64
from .channel import Channel
from .commands import Commands
from .files import read, write_atomic
from .identity import Identity
from .loop import Loop
from .mux import Mux
from .port import CONTROL_PORT, STREAM_PORT, Port, open_port
from .system import System

VERSION = 1
OUTBOX_LOST = 8 << 20  # bytes; above this nobody is reading: the session is dropped
TICK = 0.15  # seconds; a port that is listened to shall be known within 0.2
USAGE = "agent.py [--control PATH|fd:N] [--streams PATH|fd:N] [--seed DEVICE|FILE|none] [--root DIR]"


class Agent:
    """Operations: the session itself. The others are in `groups` of the channel."""

    def __init__(self, options):
        self.options = options
        self.digest = None
        self.loop = Loop()
        self.identity = Identity(self.loop, options)

    def start(self):
        _thread.start_new_thread(self.identity.apply_seed, ())
        control = Port(open_port(self.options["--control"], CONTROL_PORT))
        self.channel = self.identity.channel = Channel(self.loop, control)
        self.commands = Commands(self.loop, self.channel, self.identity)
        self.system = System(self.channel, self.identity, self.options)
        self.channel.groups = (self, self.commands, self.identity, self.system)
        self.channel.take_stdin = self.commands.take_stdin
        self.mux = Mux(self.loop, Port(open_port(self.options["--streams"], STREAM_PORT)))
        for each in (self.channel, self.mux):
            self.loop.watch(each.port.fd, each.on_port, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        self.channel.announce({"event": "started", "pid": os.getpid()})
        self.run()

    def run(self):
        next_tick = 0.0
        while True:
            more, now = False, time.monotonic()
            if now >= next_tick:  # before what it has to say is written
                next_tick = now + TICK
                self.tick(now)
            for each in (self.channel, self.mux):
                if each.port.more:
                    each.on_port()
                each.port.flush()
                more |= each.port.more
            self.loop.mute(self.commands.outputs, self.channel.port.full)
            self.loop.mute(self.mux.sockets, self.mux.port.full)
            now = time.monotonic()
            self.loop.dispatch(0 if more else max(0.0, min(next_tick - now, 0.01 if self.mux.retry else TICK)))
            self.mux.connect_again()

    def tick(self, now):
        self.commands.end_late(now)
        for port in (self.channel.port, self.mux.port):
            if len(port.out) > OUTBOX_LOST:
                port.out.clear()
        if self.channel.port.closed and self.options["--control"]:
            self.channel.port.read(1)
        if self.channel.session is not None:
            self.system.report_listeners()

    def op_hello(self, message):
        """A new session: whoever was here before is gone, and so is what it began."""
        if message["nonce"] != self.channel.session:
            self.commands.end_all()
            self.channel.begin(message["nonce"])
            self.system.listeners = None
        if self.digest is None:  # 50 ms under emulation; a fork has it from the machine it came from
            self.digest = sha256(read(os.path.abspath(__file__)) or b"")
        return {"ok": True, "nonce": self.channel.session, "version": VERSION, "pid": os.getpid(),
                "boot_id": (read("/proc/sys/kernel/random/boot_id") or b"").decode().strip(),
                "digest": self.digest, "seed": self.identity.seed,
                "uptime": time.clock_gettime(time.CLOCK_BOOTTIME)}

    def op_streams(self, message):
        self.mux.begin(unb64(message["marker"]))
        return {"ok": True}

    def op_update(self, message):
        """Replace this file and become it, keeping the ports: the next `started` event comes from the new one."""
        data = self.channel.collect(message)
        if data is None:
            return
        if len(self.commands) or self.identity.applying.locked():
            raise Failure("commands are running, or the seed is being applied")
        compile(data, "agent.py", "exec")  # a file that Python cannot read must not lock us out
        path = os.path.abspath(__file__)
        changed = write_atomic(path, data, 0o755)
        self.channel.send({"id": message["id"], "ok": True, "changed": changed})
        control = self.channel.port
        os.set_blocking(control.fd, True)
        control.flush()
        fds = {"--control": control.fd, "--streams": self.mux.port.fd}
        argv = [sys.executable, "-I", "-S", path]
        for option, value in self.options.items():
            if option in fds:
                os.set_inheritable(fds[option], True)
                argv += [option, f"fd:{fds[option]}"]
            elif value:
                argv += [option, value]
        os.execv(sys.executable, argv)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = {"--control": None, "--streams": None, "--seed": None, "--root": "/"}
    while argv:
        if argv[0] not in options or len(argv) < 2:
            print(USAGE, file=sys.stderr)
            return 2
        options[argv[0]], argv = argv[1], argv[2:]
    Agent(options).start()
    return 0


if __name__ == "__main__":
    sys.exit(main())

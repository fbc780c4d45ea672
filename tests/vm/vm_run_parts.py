"""What the tests of `qvm run` share: looking for what is left, starting runs, a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

from conftest import QVM, User


def left(box: User) -> list[str]:
    """What runs have left: processes, files, docker contexts."""
    files = [str(path) for path in Path(box.env["QVM_HOME"]).rglob("*") if path.name != "_runs"]
    contexts = [str(path) for path in (box.home / "docker").glob("contexts/**/*")]
    return [*box.processes(), *files, *contexts]


def qemu_of(box: User) -> int | None:
    """The pid of the QEMU of this user's run, once it is there."""
    return next((int(line.split()[0]) for line in box.processes() if "qemu-system" in line), None)


def start(box: User, *argv: str, **streams: int) -> subprocess.Popen[bytes]:
    """`qvm run ARGV...` with standard output in a pipe; waits until its command has said "ready"."""
    wanted = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    child = subprocess.Popen([QVM, "run", *argv], cwd=box.work, env=box.env, **wanted)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n", child.stderr.read() if child.stderr else b""
    return child


class Screen:
    """A terminal of 31 rows and 97 columns with `qvm run ARGV...` on it."""

    def __init__(self, box: User, *argv: str) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(31, 97)
        self.before = termios.tcgetattr(self.slave)
        self.seen = b""
        self.pid = os.fork()
        if self.pid == 0:
            os.chdir(box.work)
            os.login_tty(self.slave)
            os.execve(QVM, [str(QVM), "run", *argv], {**box.env, "TERM": "xterm"})

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def expect(self, wanted: bytes, seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while wanted not in self.seen:
            left = end - time.monotonic()
            assert left > 0, f"{wanted!r} did not come; seen: {self.seen!r}"
            if select.select([self.master], [], [], left)[0]:
                self.seen += os.read(self.master, 4096)
        self.seen = self.seen.partition(wanted)[2]

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self.master)
        os.close(self.slave)


@contextlib.contextmanager
def screen(box: User, *argv: str) -> Iterator[Screen]:
    made = Screen(box, *argv)
    try:
        yield made
    finally:
        made.close()

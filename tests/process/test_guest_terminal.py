"""A guest's program on our own terminal, pipes and files: a real agent, a real terminal, real signals."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
DRIVER = HERE / "terminal_driver.py"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short: sockets are made in it."""
    with tempfile.TemporaryDirectory(prefix="qvmt", dir="/tmp") as name:
        yield Path(name)


def start(folder: Path, *argv: str, **streams: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(DRIVER), str(folder), *argv], env=environment(), **streams)


def environment() -> dict[str, str]:
    return {**os.environ, "TERM": "qvm-test", "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}"}


class Screen:
    """A terminal with our driver on it."""

    def __init__(self, folder: Path, *argv: str, rows: int = 33, cols: int = 101) -> None:
        self.master, slave = pty.openpty()
        self.resize(rows, cols)
        self.before = termios.tcgetattr(slave)
        self.seen = b""
        self.pid = os.fork()
        if self.pid == 0:
            os.login_tty(slave)
            os.execve(sys.executable, [sys.executable, str(DRIVER), str(folder), *argv], environment())
        self.slave = slave

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def expect(self, wanted: bytes, seconds: float = 20.0) -> bytes:
        end = time.monotonic() + seconds
        while wanted not in self.seen:
            left = end - time.monotonic()
            assert left > 0, f"{wanted!r} did not come; seen: {self.seen!r}"
            if select.select([self.master], [], [], left)[0]:
                try:
                    self.seen += os.read(self.master, 4096)
                except OSError:
                    assert wanted in self.seen, f"ended without {wanted!r}: {self.seen!r}"
        head, _, self.seen = self.seen.partition(wanted)
        return head

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def mode_is_as_before(self) -> bool:
        return termios.tcgetattr(self.slave)[:4] == self.before[:4]

    def close(self) -> None:
        for fd in (self.master, self.slave):
            os.close(fd)


@contextlib.contextmanager
def screen(folder: Path, *argv: str, **size: int) -> Iterator[Screen]:
    made = Screen(folder, *argv, **size)
    try:
        yield made
    finally:
        made.close()


def test_pipes_keep_outputs_apart_and_pass_the_exit_code(folder: Path) -> None:
    child = start(folder, "sh", "-c", "tty; cat; echo error >&2; exit 7",
                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = child.communicate(b"in\0put\xff", timeout=30)
    assert (child.returncode, out, err) == (7, b"not a tty\nin\0put\xff", b"error\n")


def test_a_terminal_is_one_in_the_guest_too(folder: Path) -> None:
    script = "tty; stty size; echo term $TERM; test -t 2 && echo err is one; exec cat"
    with screen(folder, "sh", "-c", script) as terminal:
        terminal.expect(b"/dev/pts/")
        terminal.expect(b"33 101")
        terminal.expect(b"term qvm-test")
        terminal.expect(b"err is one")
        assert not terminal.mode_is_as_before()
        terminal.type(b"hello\r")
        terminal.expect(b"hello\r\n")  # its terminal's echo
        terminal.expect(b"hello\r\n")  # cat's own
        terminal.type(b"\x04")
        assert terminal.wait() == 0
        assert terminal.mode_is_as_before()


def test_resize_reaches_the_program(folder: Path) -> None:
    with screen(folder, "sh", "-c", "trap 'stty size' WINCH; echo ready; while :; do sleep 0.1; done") as terminal:
        terminal.expect(b"ready")
        terminal.resize(20, 55)
        terminal.expect(b"20 55")
        terminal.type(b"\x03")
        assert terminal.wait() == 130
        assert terminal.mode_is_as_before()


def test_interrupt_key_goes_to_the_foreground_of_a_shell(folder: Path) -> None:
    with screen(folder, "bash", "--norc", "-i") as terminal:
        terminal.type(b"PS1='> '; sleep 100\r")
        terminal.expect(b"sleep 100\r\n")
        time.sleep(0.3)
        terminal.type(b"\x03")
        terminal.type(b"echo code $?\r")
        terminal.expect(b"code 130\r\n")
        terminal.type(b"exit 5\r")
        assert terminal.wait() == 5


def test_terminal_is_restored_when_we_are_ended(folder: Path) -> None:
    with screen(folder, "sh", "-c", "echo ready; exec cat") as terminal:
        terminal.expect(b"ready")
        assert not terminal.mode_is_as_before()
        os.kill(terminal.pid, signal.SIGINT)
        assert terminal.wait() != 0
        assert terminal.mode_is_as_before()


def test_a_broken_pipe_ends_the_program_as_in_a_shell(folder: Path) -> None:
    child = start(folder, "sh", "-c", "yes; echo done >&2; kill -PIPE $$", stdin=subprocess.DEVNULL,
                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    assert child.stdout.read(4) == b"y\ny\n"
    child.stdout.close()
    assert child.stderr.read() == b"done\n"
    assert child.wait(30) == 128 + signal.SIGPIPE


def test_input_from_files_and_from_nowhere(folder: Path, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as target:
        assert start(folder, "cat", stdin=source.fileno(), stdout=target.fileno()).wait(60) == 0
    assert (tmp_path / "out").read_bytes() == data
    other = folder / "b"
    other.mkdir()
    child = start(other, "cat", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert child.communicate(timeout=30)[0] == b"" and child.returncode == 0


def test_closed_standard_streams_are_no_crash(folder: Path) -> None:
    argv = [sys.executable, str(DRIVER), str(folder), "sh", "-c", "cat; echo lost; exit 3"]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&-', "sh", *argv], env=environment(), timeout=30, check=False)
    assert done.returncode == 3


def test_much_input_takes_bounded_memory(folder: Path) -> None:
    size = 64 << 20
    block = os.urandom(1 << 20)
    child = start(folder, "sha256sum", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    digest = hashlib.sha256()
    for _ in range(size // len(block)):
        child.stdin.write(block)
        digest.update(block)
    peak = int(next(line.split()[1] for line in Path(f"/proc/{child.pid}/status").read_text().splitlines()
                    if line.startswith("VmHWM")))
    child.stdin.close()
    assert child.stdout.read().split()[0].decode() == digest.hexdigest()
    assert child.wait(30) == 0
    assert peak < (100 << 10), f"{peak} KiB"


def test_a_slow_reader_slows_the_program_down(folder: Path) -> None:
    """Output that nobody takes is not kept in memory; once it is taken, all of it is there."""
    count = 40 << 20
    child = start(folder, "head", "-c", str(count), "/dev/zero", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert child.stdout is not None
    time.sleep(2)
    status = Path(f"/proc/{child.pid}/status").read_text()
    peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
    assert peak < (100 << 10), f"{peak} KiB"
    assert len(child.stdout.read()) == count
    assert child.wait(30) == 0


def test_stop_and_go_on_with_the_shells_job_control(folder: Path) -> None:
    script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done"
    child = start(folder, "sh", "-c", script, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    os.kill(child.pid, signal.SIGTSTP)
    assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1])
    time.sleep(0.2)
    os.set_blocking(child.stdout.fileno(), False)
    before = child.stdout.read() or b""
    time.sleep(1.0)
    assert (child.stdout.read() or b"") == b"", before
    os.kill(child.pid, signal.SIGCONT)
    end = time.monotonic() + 10
    while not child.stdout.read() and time.monotonic() < end:
        time.sleep(0.05)
    assert time.monotonic() < end
    child.send_signal(signal.SIGINT)  # the driver ends its agent
    child.wait(30)

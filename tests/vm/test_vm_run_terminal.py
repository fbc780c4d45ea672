"""`qvm run` on a terminal of ours."""

from __future__ import annotations

import os
import signal
import termios
import time

import pytest
from conftest import User
from vm_run_parts import Screen, left, qemu_of, screen

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def box(user: User) -> User:
    user.qvm("run", "--", "true", timeout=900)
    return user


def test_terminal(box: User) -> None:
    with screen(box, "--", "bash", "--norc") as terminal:
        terminal.type(b"PS1='$ '; tty; stty size; echo $TERM; test -t 2 && echo err too\r")
        for line in (b"/dev/pts/", b"31 97\r\n", b"xterm\r\n", b"err too\r\n"):
            terminal.expect(line)
        terminal.resize(40, 120)
        terminal.type(b"sleep 0.2; stty size\r")
        terminal.expect(b"40 120\r\n")
        terminal.type(b"sleep 100\r")
        time.sleep(1)
        terminal.type(b"\x03")
        terminal.type(b"echo code $?\r")
        terminal.expect(b"code 130\r\n")
        terminal.type(b"exit 9\r")
        assert terminal.wait() == 9
        assert termios.tcgetattr(terminal.slave) == terminal.before
    assert left(box) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_terminal_is_restored_by_signals(box: User, signum: int) -> None:
    with screen(box, "--", "sh", "-c", "echo ready; exec sleep 100") as terminal:
        terminal.expect(b"ready")
        assert termios.tcgetattr(terminal.slave) != terminal.before
        os.kill(terminal.pid, signum)
        assert terminal.wait() == 128 + signum
        assert termios.tcgetattr(terminal.slave) == terminal.before
    assert left(box) == []


def test_terminal_that_closes_ends_everything(box: User) -> None:
    terminal = Screen(box, "--", "sh", "-c", "echo ready; exec sleep 100")
    terminal.expect(b"ready")
    terminal.close()
    assert terminal.wait() in (129, -signal.SIGHUP)
    assert left(box) == []


def test_interrupt_keys_leave_a_machine_that_hangs(box: User) -> None:
    with screen(box, "--", "sh", "-c", "echo ready; exec cat") as terminal:
        terminal.expect(b"ready")
        os.kill(qemu_of(box) or 0, signal.SIGSTOP)
        for _ in range(8):
            terminal.type(b"\x03")
            time.sleep(0.5)
        assert terminal.wait() == 130
        assert termios.tcgetattr(terminal.slave) == terminal.before
    assert left(box) == []

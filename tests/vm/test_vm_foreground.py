"""`qvm start --foreground`: it stays, tells what happens, and a signal to it stops the VM."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import QVM, User, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]

START = ("start", "front", "--foreground", "--cold", "--runtime", "none", "--memory", "1", "--mount", "none")
STAYS = "runs in the foreground"


class Session:
    """`qvm start --foreground` with everything it has said so far."""

    def __init__(self, user: User, *argv: str) -> None:
        self.path: Path = user.home / f"front-{time.monotonic_ns()}.log"
        with self.path.open("wb") as log:
            self.process = subprocess.Popen(
                [str(QVM), *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                cwd=user.work, env=user.env, start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.path.read_text()

    def wait_for_text(self, words: str, seconds: float) -> None:
        wait_for(lambda: words in self.text or self.process.poll() is not None, seconds, f"{words!r} in {self.text!r}")
        assert words in self.text

    def wait_for_end(self, seconds: float = 60) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it does not end; it said:\n{self.text}")


@pytest.fixture
def session(user: User) -> Iterator[Session]:
    session = Session(user, *START)
    yield session
    if session.process.poll() is None:
        session.process.kill()
        session.process.wait()


def assert_stopped_cleanly(user: User) -> None:
    assert user.status("front")["state"] == "stopped"
    wait_for(lambda: not user.processes(), 5, "nothing runs on")
    serial = user.home / "q" / "_instances" / "front" / "serial.log"
    assert "reboot: Power down" in serial.read_text(errors="replace")[-2000:], "the guest shut itself down"


def test_an_interrupt_stops_the_vm_and_is_told_on(user: User, session: Session) -> None:
    session.wait_for_text(STAYS, 240)
    news, _, _ = session.text.partition(STAYS)
    assert "front is running after" in news, "the start is told when it is done, not at the end"
    assert user.status("front")["state"] == "running"
    user.qvm("ssh", "front", "--", "sudo systemd-run --unit=web python3 -m http.server 8097")
    session.wait_for_text("port 127.0.0.1:8097 (forwarding)", 30)
    session.process.send_signal(signal.SIGINT)
    assert session.wait_for_end() == 130
    assert session.text.endswith("qvm: interrupted\n")
    assert "Traceback" not in session.text
    assert_stopped_cleanly(user)


def test_sigterm_stops_the_vm_and_is_a_success(user: User, session: Session) -> None:
    session.wait_for_text(STAYS, 240)
    session.process.terminate()
    assert session.wait_for_end() == 0
    assert "Traceback" not in session.text
    assert_stopped_cleanly(user)


def test_a_stop_from_elsewhere_ends_it(user: User, session: Session) -> None:
    session.wait_for_text(STAYS, 240)
    user.qvm("stop", "front")
    assert session.wait_for_end(20) == 0
    assert "front has stopped (powerdown)" in session.text
    assert_stopped_cleanly(user)


def test_a_supervisor_that_dies_is_replaced(user: User, session: Session) -> None:
    session.wait_for_text(STAYS, 240)
    before = user.status("front")
    os.kill(before["supervisor_pid"], signal.SIGKILL)
    session.wait_for_text("another one takes over", 20)
    wait_for(lambda: user.status("front")["state"] == "running", 30, "the new supervisor's readiness")
    assert user.status("front")["pid"] == before["pid"], "the VM ran on"
    session.process.send_signal(signal.SIGINT)
    assert session.wait_for_end() == 130
    assert_stopped_cleanly(user)


def test_sigterm_during_the_boot_leaves_nothing(user: User, session: Session) -> None:
    wait_for(lambda: any("qemu-system" in line for line in user.processes()), 60, "QEMU starting")
    session.process.terminate()
    assert session.wait_for_end() == 130
    wait_for(lambda: not user.processes(), 10, "nothing runs on")
    assert user.status("front")["state"] == "stopped"


def test_a_terminal_that_closes_stops_the_vm(user: User) -> None:
    """With bars and all on a real terminal, which then hangs up."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(user.work)
        os.execve(QVM, [str(QVM), *START], {**user.env, "TERM": "xterm"})
    shown = bytearray()
    end = time.monotonic() + 240
    while STAYS.encode() not in shown:
        assert time.monotonic() < end, shown.decode(errors="replace")
        if select.select([terminal], [], [], 1.0)[0]:
            shown += os.read(terminal, 65536)
    os.close(terminal)
    wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z", 60, "its end")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert_stopped_cleanly(user)

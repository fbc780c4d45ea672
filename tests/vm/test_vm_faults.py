"""What goes wrong while a VM lives: killed processes, stale files, races, interrupts. Nothing may be lost."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from conftest import User, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def box(user: User) -> User:
    user.qvm("start", "box", "--runtime", "none")
    user.qvm("ssh", "box", "--", "echo kept | sudo tee /var/lib/qvm/kept && sudo sync")
    return user


def pid_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def kept(box: User) -> str:
    return box.qvm("ssh", "box", "--", "cat /var/lib/qvm/kept").stdout.strip()


def test_two_starts_at_once_are_one_vm(user: User) -> None:
    racers = [user.popen("start", "race", "--runtime", "none") for _ in range(2)]
    codes = [racer.wait(400) for racer in racers]
    errors = [(racer.communicate()[1] or b"").decode() for racer in racers]
    assert codes == [0, 0], errors
    assert sum("qemu-system" in line for line in user.processes()) == 1
    user.qvm("delete", "race", "-f", "--data")


def test_supervisor_killed_is_adopted(box: User) -> None:
    status = box.status("box")
    os.kill(status["supervisor_pid"], signal.SIGKILL)
    wait_for(lambda: pid_gone(status["supervisor_pid"]), 5, "the supervisor's end")
    assert box.status("box")["state"] == "unsupervised"
    assert kept(box) == "kept"
    box.qvm("start", "box")
    after = box.status("box")
    assert after["state"] == "running"
    assert after["pid"] == status["pid"], "QEMU was adopted, not started anew"
    assert after["supervisor_pid"] != status["supervisor_pid"]


def test_qemu_killed_reads_as_stopped(box: User) -> None:
    status = box.status("box")
    os.kill(status["pid"], signal.SIGKILL)
    wait_for(lambda: box.status("box")["state"] == "stopped", 10, "status tells that it stopped")
    wait_for(lambda: not box.processes(), 5, "the supervisor ends with its QEMU")
    box.qvm("start", "box")
    assert kept(box) == "kept"


def test_both_killed_then_stop_and_start(box: User) -> None:
    status = box.status("box")
    for pid in (status["supervisor_pid"], status["pid"]):
        os.kill(pid, signal.SIGKILL)
    for pid in (status["supervisor_pid"], status["pid"]):
        wait_for(lambda pid=pid: pid_gone(pid), 5, "the end of both")
    assert box.status("box")["state"] == "stopped"
    box.qvm("stop", "box")
    box.qvm("start", "box")
    assert kept(box) == "kept"


def test_stale_pid_file_naming_another_process(box: User) -> None:
    box.qvm("stop", "box")
    run = {
        "version": 1, "qemu": {"pid": os.getpid(), "started": 1.0, "marker": "pytest"}, "ssh_port": 1, "accel": "tcg",
        "started": 0.0, "runtime_version": "", "ready": True, "extra": {},
    }
    folder = box.home / "q" / "_instances" / "box"
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "qmp.sock").write_text("stale")
    assert box.status("box")["state"] == "stopped"
    assert box.qvm("stop", "box").returncode == 0
    box.qvm("start", "box")
    assert kept(box) == "kept"


def test_kill_during_start_leaves_no_trace(box: User) -> None:
    box.qvm("stop", "box")
    racing = box.popen("start", "box")
    wait_for(lambda: any("qemu-system" in line for line in box.processes()), 60, "QEMU starting")
    time.sleep(1.0)
    racing.send_signal(signal.SIGINT)
    assert racing.wait(60) == 130
    wait_for(lambda: not box.processes(), 10, "nothing runs after the interrupt")
    assert box.status("box")["state"] == "stopped"
    box.qvm("start", "box")
    assert kept(box) == "kept"


def test_guest_that_cannot_boot_is_explained(box: User) -> None:
    """A blank root disk: the failed requirement, the console's last lines and the log are shown, nothing runs on."""
    box.qvm("stop", "box", "-f")
    root = box.home / "q" / "_instances" / "box" / "root.qcow2"
    aside = root.with_suffix(".aside")
    root.rename(aside)
    box.run("qemu-img", "create", "-q", "-f", "qcow2", str(root), "20G")
    bad = box.qvm("start", "box", check=False)
    assert bad.returncode == 5
    assert "hint:" in bad.stderr and "serial.log" in bad.stderr and "root" in bad.stderr
    assert not box.processes()
    assert box.status("box")["state"] == "stopped"
    aside.rename(root)
    box.qvm("start", "box")
    assert kept(box) == "kept"

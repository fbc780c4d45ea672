"""Programs that end with whoever started them, even when that one is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qvm.process import spawn_dying

WAYS = [False, True] if sys.platform == "linux" else [True]

PARENT = """
import sys, time
from qvm.process import spawn_dying
with open(sys.argv[1], "wb") as log:
    child = spawn_dying(["sleep", "1000"], log=log.fileno(), watched=sys.argv[2] == "True")
print(child.child.pid, flush=True)
time.sleep(1000)
"""


def group_members(group: int) -> list[int]:
    """Live processes of a process group."""
    listing = subprocess.run(["ps", "-eo", "pid,pgid,stat"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines()[1:]]
    return [int(pid) for pid, pgid, state in rows if int(pgid) == group and not state.startswith("Z")]


def wait_for_end(group: int) -> None:
    end = time.monotonic() + 10
    while group_members(group):
        assert time.monotonic() < end, f"still there: {group_members(group)}"
        time.sleep(0.02)


@pytest.mark.parametrize("watched", WAYS)
def test_ends_with_a_parent_that_is_killed(tmp_path: Path, *, watched: bool) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "log"), str(watched)],
                              stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.1)
    assert pid in group_members(pid)
    assert b"sleep\x001000" in Path(f"/proc/{pid}/cmdline").read_bytes() or sys.platform != "linux"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for_end(pid)


@pytest.mark.parametrize("watched", WAYS)
def test_kill_leaves_nothing(tmp_path: Path, *, watched: bool) -> None:
    before = len(list(Path("/dev/fd").iterdir()))
    with (tmp_path / "log").open("wb") as log:
        child = spawn_dying(["sleep", "1000"], log=log.fileno(), watched=watched)
        time.sleep(0.1)
        child.kill()
        child.kill()
    assert group_members(child.child.pid) == []
    assert child.child.returncode == -signal.SIGKILL
    assert len(list(Path("/dev/fd").iterdir())) == before


@pytest.mark.parametrize("watched", WAYS)
def test_an_end_by_itself_takes_the_watcher_along(tmp_path: Path, *, watched: bool) -> None:
    with (tmp_path / "log").open("wb") as log:
        child = spawn_dying(["sh", "-c", "echo words; umask; exit 3"], log=log.fileno(), watched=watched, umask=0o177)
        assert child.child.wait(10) == 3
        child.kill()
    wait_for_end(child.child.pid)
    assert (tmp_path / "log").read_text() == "words\n0177\n"

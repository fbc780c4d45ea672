"""Locks between processes: exclusive, named, and gone with their holder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qvm.errors import HostError, LockHeldError
from qvm.locks import lock

HOLD = """
import sys, time
from pathlib import Path
from qvm.locks import lock
with lock(Path(sys.argv[1]), what="the thing"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        yield child
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


def test_a_held_lock_names_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.lock"
    with holder(path) as child:
        lines: list[str] = []
        with (
            pytest.raises(LockHeldError, match=f"process {child.pid} is working on the thing"),
            lock(path, what="the thing", timeout=0.05, on_wait=lines.append),
        ):
            pass
        assert lines == [f"waiting for process {child.pid}, which works on the thing"]


def test_a_killed_holder_leaves_no_stale_lock(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with holder(path) as child:
        child.send_signal(signal.SIGKILL)
        with lock(path, what="the thing", timeout=10):
            assert path.read_text() == str(os.getpid())
    with lock(path, what="the thing", timeout=0):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_lock_is_released_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with pytest.raises(KeyError), lock(path, what="it"):
        raise KeyError
    with lock(path, what="it", timeout=0):
        assert path.exists()


def test_a_folder_that_cannot_be_made_is_a_host_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot write to"), lock(tmp_path / "file" / "x.lock", what="it"):
        pass

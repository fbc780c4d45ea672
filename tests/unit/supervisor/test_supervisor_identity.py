"""Who holds a supervisor's lock."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from qvm.filenames import Files
from qvm.supervisor.launch import supervisor_identity


def test_one_that_ends_while_it_is_looked_for_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process gives its locks back a moment after it has become nothing that could be asked for."""
    monkeypatch.setenv("QVM_HOME", str(tmp_path))
    lock = Files("dev").supervisor_lock
    lock.parent.mkdir(parents=True)
    gone = subprocess.Popen(["true"])
    gone.wait()
    lock.write_text(str(gone.pid))
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert supervisor_identity("dev") is None
        lock.write_text(str(os.getpid()))
        found = supervisor_identity("dev")
        assert found is not None and found.pid == os.getpid()
    assert supervisor_identity("dev") is None

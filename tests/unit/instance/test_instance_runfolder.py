"""Folders of throw-away machines: who lives keeps his, and who was killed leaves nothing for long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qvm.errors import PathTooLongError
from qvm.instance.runfolder import make_run_folder, runs_dir, sweep_runs


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QVM_HOME", str(tmp_path / "q"))
    return tmp_path / "q"


def test_nothing_to_sweep_before_the_first() -> None:
    assert sweep_runs() == []


def test_private_and_gone_at_the_end() -> None:
    folder = make_run_folder()
    assert folder.path.parent == runs_dir()
    assert folder.path.stat().st_mode & 0o777 == 0o700
    (folder.path / "root.qcow2").write_text("x")
    folder.vanish()
    assert not folder.path.exists()
    folder.close()
    folder.close()
    assert list(runs_dir().iterdir()) == []


def test_the_living_are_not_swept_and_the_killed_are() -> None:
    script = "import time\nfrom qvm.instance.runfolder import make_run_folder\nf = make_run_folder()\n" \
             "(f.path / 'disk').write_text('x')\nprint(f.path, flush=True)\ntime.sleep(100)"
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    left = Path(child.stdout.readline().strip())
    ours = make_run_folder()
    assert sweep_runs() == []
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert left.exists()
    assert sweep_runs() == [left]
    assert not left.exists() and ours.path.exists()
    ours.close()


def test_sweeping_while_others_are_made_takes_none_of_them() -> None:
    made, stop = [], threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            sweep_runs()

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for _ in range(200):
            made.append(make_run_folder())
    finally:
        stop.set()
        sweeper.join()
    assert all(folder.path.is_dir() for folder in made)
    for folder in made:
        folder.close()
    assert os.listdir(runs_dir()) == []  # noqa: PTH208  the names are what matters


def test_a_home_too_deep_for_sockets_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QVM_HOME", str(tmp_path / ("d" * 100)))
    with pytest.raises(PathTooLongError):
        make_run_folder()

"""Folders of machines without a name: QVM_HOME/_runs/<name>, one a machine, locked while it lives.

`qvm run` keeps its machine's disks and sockets there, the making of a warm image its sockets. A run removes its folder
as soon as QEMU has everything in it open, so there is little to leave behind; what a killed one left all the same, the
next one sweeps away.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from pathlib import Path

from qvm import paths
from qvm.errors import HostError
from qvm.filenames import check_socket_path


def runs_dir() -> Path:
    return paths.home() / "_runs"


class RunFolder:
    """A private folder (0700) with a short path, since sockets are made in it. Make it with `make_run_folder`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock

    @property
    def monitor_socket(self) -> Path:
        return self.path / "m"

    @property
    def agent_socket(self) -> Path:
        return self.path / "a"

    @property
    def stream_socket(self) -> Path:
        return self.path / "s"

    def vanish(self) -> None:
        """Remove it with all its names; what is open stays usable for those who have it open. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)

    def close(self) -> None:
        """Remove it and let go of its lock."""
        self.vanish()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def make_run_folder() -> RunFolder:
    """A new folder, locked; HostError where QVM_HOME cannot be written to or its path is too long for sockets."""
    parent = runs_dir()
    paths.ensure_private_dir(parent)
    while True:
        path = parent / secrets.token_hex(3)
        check_socket_path(path / "m")
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            continue
        except OSError as error:
            raise HostError(f"cannot write to {parent}: {error.strerror}", hint="set QVM_HOME") from error
        lock = _take(path)
        if lock is not None:
            return RunFolder(path, lock)


def _take(path: Path) -> int | None:
    """The lock of a folder that is there; None where another process holds it or has removed it meanwhile."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_ino == path.stat().st_ino:
            return fd
    except OSError:
        pass  # held by a sweeper or the folder's own run, or gone
    os.close(fd)
    return None


def sweep_runs() -> list[Path]:
    """Remove the folders of runs that were killed; returns which. A run that lives holds its lock."""
    removed = []
    try:
        entries = list(runs_dir().iterdir())
    except OSError:
        return []
    for path in entries:
        lock = _take(path)
        if lock is not None:
            RunFolder(path, lock).close()
            removed.append(path)
    return removed

"""Advisory file locks (flock): released by the kernel when the holder dies, so never stale."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qvm import paths
from qvm.errors import HostError, LockHeldError
from qvm.wait import Deadline, backoff


@contextmanager
def lock(
    path: Path, *, what: str, timeout: float | None = None, on_wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold an exclusive lock on `path` while the block runs.

    Waits up to `timeout` seconds (None: as long as it takes); `on_wait` gets one line naming the holder when
    waiting begins. Raises LockHeldError naming the holder when the time is up.
    """
    paths.ensure_private_dir(path.parent)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(f"cannot write to {path}: {error.strerror}",
                        hint="set QVM_HOME and QVM_CACHE_HOME to folders you can write to") from error
    try:
        _acquire(fd, what, timeout, on_wait)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


def _acquire(fd: int, what: str, timeout: float | None, on_wait: Callable[[str], None] | None) -> None:
    deadline = Deadline(timeout if timeout is not None else 10**9, f"waiting for {what}")
    for attempt, pause in enumerate(backoff()):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "another process"
        if attempt == 0 and on_wait is not None:
            on_wait(f"waiting for process {holder}, which works on {what}")
        if deadline.passed:
            raise LockHeldError(f"process {holder} is working on {what}",
                                hint="wait for it to end, or try again later")
        time.sleep(min(pause, deadline.left))

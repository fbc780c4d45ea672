"""A supervisor's process before there is anything to supervise: it loads its code while the command loads its own.

Imports next to nothing, so that this can be the first thing a command does.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from qvm.filenames import Files
from qvm.process import spawn_detached

if TYPE_CHECKING:
    from subprocess import Popen


class Prelaunched:
    """A supervisor's process that has loaded its code and waits for its instance to be prepared.

    Use as a context manager: where `ensure_supervisor` has not taken it by the end of the block, it ends.
    """

    def __init__(self) -> None:
        self.child = spawn_detached([sys.executable, "-m", "qvm.supervisor"], log=None, stdin=True)

    def go(self, profile: str) -> Popen[bytes] | None:
        """Have it serve `profile`; None where it has died."""
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(profile.encode() + b"\n")
            self.child.stdin.close()
        except BrokenPipeError:
            return None
        return self.child

    def __enter__(self) -> Prelaunched:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()  # it reads the end, unless it has read its profile before


def prelaunch(profile: str) -> AbstractContextManager[Prelaunched | None]:
    """One for an instance that seems to be off; to be given to the command that starts it."""
    return nullcontext() if Files(profile).run.exists() else Prelaunched()

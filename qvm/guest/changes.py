"""Which changes of host folders a guest is told of, and when. Pure: times and states are given.

A file that is being written is told of when it has been quiet for a moment, or after a longest wait. What is told makes
the guest set the file's group to what it is, which the host's watcher reports in turn: a change that leaves a file as
it was when it was last told of is none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePath

QUIET = 0.04
LONGEST = 0.2
"""Seconds: with the watcher's and the guest's own time this must stay below half a second."""
MANY = 1000
"""Files in one go above which only their folders are told of: whoever watches so many looks at folders anew."""
LEFT_OUT = (".git", "node_modules")
"""What is in folders of these names is not told of; the agent (cloud-init/agent/pins.py) has the same."""
_MOST_KNOWN = 50_000

State = tuple[int, int, int, int]
"""Inode, time of change (ns), size, mode."""


def state_of(path: Path) -> State | None:
    """None where there is nothing."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode


def is_left_out(inside: PurePath) -> bool:
    """Of a path from the mount on."""
    return any(part in LEFT_OUT for part in inside.parts[:-1])


class Changes:
    def __init__(self) -> None:
        self._pending: dict[Path, tuple[float, float]] = {}
        """First and last time each was noted."""
        self._told: dict[Path, State] = {}

    def note(self, path: Path, now: float) -> None:
        first, _ = self._pending.get(path, (now, now))
        self._pending[path] = (first, now)

    def next_due(self) -> float | None:
        """When the next is due, None where nothing is pending."""
        return min((self._due(*times) for times in self._pending.values()), default=None)

    @staticmethod
    def _due(first: float, last: float) -> float:
        return min(last + QUIET, first + LONGEST)

    def take_due(self, now: float) -> list[Path]:
        due = [path for path, times in self._pending.items() if self._due(*times) <= now]
        for path in due:
            del self._pending[path]
        return due

    def choose(self, found: Sequence[tuple[Path, State | None]]) -> list[Path]:
        """Of what was due, with the states it has now, what has changed. What has gone shows in its folder."""
        changed = []
        for path, state in found:
            if state is None:
                self._told.pop(path, None)
            elif self._told.get(path) != state:
                self._told[path] = state
                changed.append((path, state))
        while len(self._told) > _MOST_KNOWN:
            del self._told[next(iter(self._told))]
        if len(changed) <= MANY:
            return [path for path, _ in changed]
        return list(dict.fromkeys(path.parent for path, _ in changed))

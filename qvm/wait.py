"""Deadlines that are passed down, and the one polling loop for what offers no event."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from qvm.errors import DeadlineError

T = TypeVar("T")


class Deadline:
    """A moment (monotonic clock) by which something must be done; made once and passed down."""

    def __init__(self, seconds: float, what: str = "it") -> None:
        self.seconds = seconds
        self.what = what
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())

    @property
    def passed(self) -> bool:
        return self.left == 0.0

    def check(self) -> None:
        if self.passed:
            raise DeadlineError(f"{self.what} took longer than {self.seconds:g} s")


def backoff(*, first: float = 0.005, factor: float = 1.6, most: float = 0.5) -> Iterator[float]:
    """Pauses in seconds for a poll that cannot be avoided: 5 ms and growing."""
    pause = first
    while True:
        yield pause
        pause = min(pause * factor, most)


def wait_until(probe: Callable[[], T | None], deadline: Deadline) -> T:
    """The first result of `probe` that is neither None nor False; DeadlineError when the deadline passes first."""
    for pause in backoff():
        result = probe()
        if result is not None and result is not False:
            return result
        deadline.check()
        time.sleep(min(pause, deadline.left))
    raise AssertionError("unreachable")

"""How long work tells what it does: library code reports into a `Progress`; the CLI draws it, programs ignore it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Step(Protocol):
    """One piece of work under way."""

    def update(self, done: int, total: int | None = None) -> None:
        """Progress in the step's unit; `total` may become known, or change, late."""

    def detail(self, text: str) -> None:
        """A few words on what is being done right now."""


class Progress(Protocol):
    def step(self, name: str, *, total: int | None = None, unit: str = "") -> AbstractContextManager[Step]:
        """Announce a step; it is done when the block ends, failed when it raises. `unit`: "B" for bytes."""

    def milestone(self, name: str, state: str, seconds: float) -> None:
        """A named requirement of a start reached `state` (waiting, done, failed) after `seconds`."""

    def note(self, line: str) -> None:
        """One line the user should see whatever else is drawn (a fallback taken, a default left out)."""


class _NullStep:
    def update(self, done: int, total: int | None = None) -> None: ...

    def detail(self, text: str) -> None: ...


class NullProgress:
    """Says nothing."""

    @contextmanager
    def step(self, name: str, *, total: int | None = None, unit: str = "") -> Iterator[Step]:
        yield _NullStep()

    def milestone(self, name: str, state: str, seconds: float) -> None: ...

    def note(self, line: str) -> None: ...

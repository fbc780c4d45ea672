"""What settings are read against, and how what is wrong with one is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

Step: TypeAlias = str | int
"""One step into a value: a mapping's key or a list's index."""


class Plain(str):
    """A scalar of a file that was written without quotes: it may mean a number, a truth value or nothing."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Context:
    """Where a value is read: relative paths, `~` and defaults depend on it."""

    profile: str
    cwd: Path
    environ: Mapping[str, str]

    def home(self) -> Path:
        """The user's home folder, for `~`."""
        return Path(self.environ["HOME"]) if self.environ.get("HOME") else Path.home()


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a value; `path` leads to the part of it that is."""

    text: str
    path: tuple[Step, ...] = ()


class RejectedError(ValueError):
    """A value that cannot be read at all, with every reason; becomes part of a ConfigError."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(problem.text for problem in problems))
        self.problems = problems


def reject(text: str, *path: Step) -> RejectedError:
    return RejectedError(Problem(text, path))

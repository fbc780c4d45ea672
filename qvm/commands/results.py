"""What the verbs return: plain data that `qvm.cli.output` renders as text or JSON, and that programs use as is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class StartResult:
    profile: str
    changed: bool
    """False where the instance ran already."""
    status: dict[str, Any]
    notes: list[str]
    seconds: float


@dataclass(frozen=True, slots=True)
class StopResult:
    profile: str
    changed: bool
    how: str
    """The rung of the stop ladder that did it."""
    seconds: float


@dataclass(frozen=True, slots=True)
class DeleteResult:
    profile: str
    removed: list[str]
    kept: list[str] = field(default_factory=list)

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
class SuspendResult:
    profile: str
    changed: bool
    """False where it was suspended already."""
    seconds: float
    paused: float = 0.0
    """Seconds the machine stood still before it ended."""
    timings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SnapshotResult:
    profile: str
    snapshot: str
    action: str
    """create, restore or delete."""
    seconds: float
    running: bool = False
    """Whether the snapshot holds a machine's memory; without, the machine was off."""
    paused: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CloneResult:
    profile: str
    source: str
    running: bool
    """Whether it goes on, at its next start, where the source was; else it boots."""
    seconds: float
    paused: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class DeleteResult:
    profile: str
    removed: list[str]
    kept: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class UpdateResult:
    profile: str
    changed: bool
    changes: list[str]
    """"name: old -> new"."""
    runtime_version: str
    newer_image: str | None
    """The id of the image that a new instance of the profile would begin with, where it is another one."""
    seconds: float

"""Readiness as a list of named requirements, each with a deadline of its own and a hint for when it is missed.

They run at the same time, each as soon as those it comes `after` are met; nothing here polls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from qvm.errors import NotReadyError, QvmError

State = Literal["waiting", "started", "done", "failed"]
OnEvent = Callable[[str, State, float], None]


@dataclass(frozen=True, slots=True)
class Requirement:
    """`check` returns once it is met and raises QvmError where it never will be."""

    name: str
    timeout: float
    """Seconds, counted from when those before it were met."""
    hint: str
    """What a user can do where it is not met."""
    check: Callable[[], Awaitable[object]]
    after: tuple[str, ...] = ()


async def wait_until_ready(requirements: Sequence[Requirement], on_event: OnEvent | None = None) -> dict[str, float]:
    """Meet all requirements; returns the seconds each took.

    `on_event(name, state, seconds)` hears `started`, then `done` or `failed`. Raises NotReadyError, naming it, for
    the first that fails or is late; the others are cancelled. ValueError for an order that cannot be kept.
    """
    ordered = _sorted(requirements)
    done = {requirement.name: asyncio.Event() for requirement in ordered}
    seconds: dict[str, float] = {}

    async def meet(requirement: Requirement) -> None:
        for name in requirement.after:
            await done[name].wait()
        tell = on_event or (lambda _name, _state, _seconds: None)
        tell(requirement.name, "started", 0.0)
        began = time.monotonic()
        try:
            await _check(requirement)
        except NotReadyError:
            tell(requirement.name, "failed", time.monotonic() - began)
            raise
        seconds[requirement.name] = time.monotonic() - began
        tell(requirement.name, "done", seconds[requirement.name])
        done[requirement.name].set()

    tasks = [asyncio.create_task(meet(requirement), name=f"requirement {requirement.name}") for requirement in ordered]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return seconds


async def _check(requirement: Requirement) -> None:
    try:
        async with asyncio.timeout(requirement.timeout) as deadline:
            await requirement.check()
    except NotReadyError:
        raise
    except QvmError as error:
        raise NotReadyError(requirement.name, f"{requirement.name}: {error.message}", details=error.details,
                            hint=error.hint or requirement.hint, log_path=error.log_path) from error
    except TimeoutError as error:
        what = f"was not met within {requirement.timeout:g} s" if deadline.expired() else "timed out"
        raise NotReadyError(requirement.name, f"the requirement {requirement.name!r} {what}",
                            hint=requirement.hint) from error


def _sorted(requirements: Sequence[Requirement]) -> list[Requirement]:
    """In an order that keeps every `after`; ValueError for a name twice, an unknown one, or a circle."""
    names = [requirement.name for requirement in requirements]
    if len(set(names)) != len(names):
        raise ValueError(f"requirement names must differ: {names}")
    ordered: list[Requirement] = []
    met: set[str] = set()
    left = list(requirements)
    while left:
        ready = [requirement for requirement in left if set(requirement.after) <= met]
        if not ready:
            stuck = ", ".join(f"{requirement.name} after {list(requirement.after)}" for requirement in left)
            raise ValueError(f"requirements that can never begin: {stuck}")
        ordered += ready
        met |= {requirement.name for requirement in ready}
        left = [requirement for requirement in left if requirement.name not in met]
    return ordered

"""Tell what a guest is at while it boots, by its console: a foreign image says nothing else for minutes."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from pathlib import Path

LOOK = 0.5
"""Seconds between two looks at the log."""
_KEPT = 4096

# What shows that a phase is over; one that is seen ends those before it too, for a console may be told to be quiet.
PHASES: tuple[tuple[str, re.Pattern[bytes]], ...] = (
    ("firmware", re.compile(rb"\] Linux version |Booting Linux|Loading Linux|EFI stub: ")),
    ("kernel", re.compile(rb"systemd\[1\]: |OpenRC [0-9.]+ is starting|INIT: version|Welcome to ")),
    ("services", re.compile(rb"[Cc]loud-init v\. .*running 'init-local'")),
    ("cloud-init", re.compile(rb"[Cc]loud-init v\. .*running 'init'")),
)

Tell = Callable[[str, str, float], None]


class Phases:
    """Which phases are over, from the console's words as they come."""

    def __init__(self) -> None:
        self._left = list(PHASES)
        self._seen = b""

    def feed(self, data: bytes) -> list[str]:
        """The phases that are over since the last call, in order."""
        self._seen = self._seen[-_KEPT:] + data
        last = max((number for number, (_, mark) in enumerate(self._left, 1) if mark.search(self._seen)), default=0)
        over = [name for name, _ in self._left[:last]]
        self._left = self._left[last:]
        return over


async def watch_boot(log: Path, tell: Tell, *, wanted: bool = True) -> None:
    """Report each phase that ends from now on as a milestone that is done, until cancelled."""
    phases, at, began = Phases(), log.stat().st_size if log.exists() else 0, time.monotonic()
    while wanted:
        await asyncio.sleep(LOOK)
        data = await asyncio.to_thread(_read_from, log, at)
        at += len(data)
        now = time.monotonic()
        for name in phases.feed(data):
            tell(name, "done", now - began)
            began = now


def _read_from(path: Path, at: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(at)
            return file.read(1 << 20)
    except FileNotFoundError:
        return b""

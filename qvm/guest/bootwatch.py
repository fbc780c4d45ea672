"""Tell what a guest is at while it boots, by its console: a foreign image says nothing else for minutes."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from qvm.errors import NotReadyError

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

PANIC_REQUIREMENT = "kernel"
"""What a NotReadyError is about where the kernel panicked."""
PANIC = re.compile(rb"Kernel panic - not syncing: [^\r\n]*")

Tell = Callable[[str, str, float], None]


class Phases:
    """Which phases are over, from the console's words as they come."""

    def __init__(self) -> None:
        self._left = list(PHASES)
        self._seen = b""

    @property
    def panic(self) -> str | None:
        """The kernel's last words."""
        found = PANIC.search(self._seen)
        return None if found is None else found[0].decode(errors="replace")

    def feed(self, data: bytes) -> list[str]:
        """The phases that are over since the last call, in order."""
        self._seen = self._seen[-_KEPT:] + data
        last = max((number for number, (_, mark) in enumerate(self._left, 1) if mark.search(self._seen)), default=0)
        over = [name for name, _ in self._left[:last]]
        self._left = self._left[last:]
        return over


async def watch_boot(log: Path, tell: Tell | None, *, start: int) -> str:
    """Report each phase of a boot as a milestone that is done, from byte `start` of the console's log on; returns a
    panicked kernel's last words.

    Kernels do panic under software emulation where hardware boots them: rarely, on busy hosts, when one CPU rewrites
    code that another one runs ("Oops: int3", seen with QEMU 7.2 and Linux 6.12). They would stand there for ever.
    """
    phases, at, began = Phases(), start, time.monotonic()
    while True:
        await asyncio.sleep(LOOK)
        data = await asyncio.to_thread(_read_from, log, at)
        at += len(data)
        now = time.monotonic()
        for name in phases.feed(data):
            if tell is not None:
                tell(name, "done", now - began)
            began = now
        if phases.panic is not None:
            return phases.panic


class PanicWatch:
    """Ends a machine whose kernel panics while it boots. Use as a context manager around the waiting: a NotReadyError
    that follows from the panic leaves it as one that says so."""

    def __init__(self, log: Path, tell: Tell | None, end: Callable[[], Awaitable[object]]) -> None:
        self.panic: str | None = None
        self._log, self._tell, self._end = log, tell, end

    def __enter__(self) -> PanicWatch:
        self._start = self._log.stat().st_size if self._log.exists() else 0
        self._task = asyncio.create_task(self._watch(), name="watch the boot")
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._task.cancel()
        if isinstance(error, NotReadyError) and self.panic is not None:
            raise NotReadyError(PANIC_REQUIREMENT, f"the guest's kernel gave up ({self.panic})", details=error.details,
                                hint="`qvm logs serial` shows what it said before") from error

    async def _watch(self) -> None:
        self.panic = await watch_boot(self._log, self._tell, start=self._start)
        await self._end()


def _read_from(path: Path, at: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(at)
            return file.read(1 << 20)
    except FileNotFoundError:
        return b""

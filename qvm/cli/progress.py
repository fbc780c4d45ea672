"""Progress on standard error: bars on a terminal, plain lines elsewhere; one line for every finished step."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from qvm.progress import Progress, Step
from qvm.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

# Steps shorter than this many seconds are not worth a line before they end.
_SILENCE = 5.0
_PLAIN_PAUSE = 10.0


@contextmanager
def open_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """The progress that suits `stream` (standard error by default); what is drawn is cleared away at the end."""
    stream = stream or sys.stderr
    if not stream.isatty() or os.environ.get("TERM", "dumb") == "dumb" or not _can_write("✓━⠋", stream):
        yield PlainProgress(stream)
        return
    progress = TerminalProgress(stream)
    try:
        yield progress
    finally:
        progress.close()


def _can_write(text: str, stream: TextIO) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _finished(name: str, seconds: float) -> str:
    return f"{name}: done in {format_duration(seconds)}"


def _share(done: int, total: int | None, unit: str) -> str:
    """"45 % of 1.2 GiB", "45 %" where there is no unit to count in, or how much where the whole is not known."""
    amount = format_size if unit == "B" else (lambda number: f"{number:.0f} {unit}".rstrip())
    if not total:
        return amount(done)
    share = f"{100 * done // total} %"
    return f"{share} of {amount(total)}" if unit else share


class _PlainStep:
    """Speaks up now and then while a step lasts, so that a log shows life."""

    def __init__(self, name: str, total: int | None, unit: str, stream: TextIO) -> None:
        self._name = name
        self._total = total
        self._unit = unit
        self._stream = stream
        self._next = time.monotonic() + _SILENCE
        self._detail = ""

    def update(self, done: int, total: int | None = None) -> None:
        self._total = total if total is not None else self._total
        self._speak(_share(done, self._total, self._unit))

    def detail(self, text: str) -> None:
        self._detail = text
        self._speak("")

    def _speak(self, share: str) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _PLAIN_PAUSE
        words = ", ".join(word for word in (share, self._detail) if word)
        _write(self._stream, f"{self._name} ... {words}".rstrip())


class PlainProgress:
    """Lines for pipes, logs and dumb terminals."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextmanager
    def step(self, name: str, *, total: int | None = None, unit: str = "") -> Iterator[Step]:
        began = time.monotonic()
        try:
            yield _PlainStep(name, total, unit, self._stream)
        except BaseException:
            _write(self._stream, f"{name}: failed after {format_duration(time.monotonic() - began)}")
            raise
        _write(self._stream, _finished(name, time.monotonic() - began))

    def milestone(self, name: str, state: str, seconds: float) -> None:
        if state == "done":
            _write(self._stream, _finished(name, seconds))
        elif state == "failed":
            _write(self._stream, f"{name}: failed after {format_duration(seconds)}")

    def note(self, line: str) -> None:
        _write(self._stream, f"note: {line}")


def _write(stream: TextIO, line: str) -> None:
    stream.write(line + "\n")
    stream.flush()


class _BarStep:
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def update(self, done: int, total: int | None = None) -> None:
        if total is None:
            self._bars.update(self._task, completed=done)
        else:
            self._bars.update(self._task, completed=done, total=total)

    def detail(self, text: str) -> None:
        self._bars.update(self._task, detail=text)


class TerminalProgress:
    """Bars and spinners by rich, which is imported when the first step begins; safe for several threads."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._console: Console | None = None
        self._bars: Bars | None = None
        self._open = 0
        self._waiting: dict[str, TaskID] = {}

    @contextmanager
    def step(self, name: str, *, total: int | None = None, unit: str = "") -> Iterator[Step]:
        began = time.monotonic()
        bars = self._enter()
        task = bars.add_task(name, total=total, unit=unit, detail="")
        try:
            yield _BarStep(bars, task)
        except BaseException:
            self._leave(task, f"[red]✗[/] {_escape(name)}", time.monotonic() - began)
            raise
        self._leave(task, f"[green]✓[/] {_escape(name)}", time.monotonic() - began)

    def milestone(self, name: str, state: str, seconds: float) -> None:
        if state in ("done", "failed"):
            mark = "[green]✓[/]" if state == "done" else "[red]✗[/]"
            if name in self._waiting:
                self._leave(self._waiting.pop(name), f"{mark} {_escape(name)}", seconds)
            else:
                self._print(f"{mark} {_escape(name)} [dim]{format_duration(seconds)}[/]")
        elif name not in self._waiting:
            self._waiting[name] = self._enter().add_task(name, total=None, unit="", detail="")

    def note(self, line: str) -> None:
        self._print(f"[yellow]note:[/] {_escape(line)}")

    def close(self) -> None:
        """Clear away what is still drawn; a failed start leaves milestones that nobody finishes."""
        with self._lock:
            if self._bars is not None:
                for task in self._bars.task_ids:
                    self._bars.remove_task(task)
                self._bars.stop()
                self._bars = None
            self._open = 0
            self._waiting.clear()

    def _print(self, text: str) -> None:
        self._get_console().print(text, highlight=False)

    def _get_console(self) -> Console:
        if self._console is None:
            from rich.console import Console

            self._console = Console(file=self._stream)
        return self._console

    def _enter(self) -> Bars:
        console = self._get_console()
        with self._lock:
            if self._bars is None:
                self._bars = _make_bars(console)
                self._bars.start()
            self._open += 1
            return self._bars

    def _leave(self, task: TaskID, line: str, seconds: float) -> None:
        with self._lock:
            bars = self._bars
            if bars is not None:
                bars.remove_task(task)
                self._open -= 1
                if self._open == 0:
                    bars.stop()
                    self._bars = None
        self._print(f"{line} [dim]{format_duration(seconds)}[/]")


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _make_bars(console: Console) -> Bars:
    from rich.progress import Progress as RichProgress
    from rich.progress import ProgressColumn, Task
    from rich.table import Column
    from rich.text import Text

    from qvm.cli.barline import Line, fit_line

    class Whole(ProgressColumn):
        """The whole line: columns of rich's own would each break into several lines on a narrow terminal."""

        def render(self, task: Task) -> Text:
            done, total = int(task.completed), None if task.total is None else int(task.total)
            line = Line(
                task.description, task.elapsed or 0.0,
                _share(done, total, str(task.fields["unit"])) if total or done else "",
                done / total if total else None, str(task.fields["detail"]),
            )  # fmt: skip
            names = max(len(other.description) for other in [*bars.tasks, task])
            # One column stays free: some terminals go to the next line as soon as the last one is filled.
            return Text.assemble(*fit_line(line, console.width - 1, name_width=names), no_wrap=True)

    bars = RichProgress(Whole(Column(no_wrap=True)), console=console, transient=True)
    return bars

"""The ends of logs, for errors' details; apart from `qvm.log`, since `qvm status` must not load `logging`."""

from __future__ import annotations

from pathlib import Path


def tail_of(path: Path, *, lines: int = 15, most: int = 16384) -> str:
    """The last lines of a log (of its last `most` bytes), for an error's details; "" where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(line.rstrip() for line in text.splitlines()[-lines:])

"""The outcome of a command in the guest, shared by the channel that runs it and the runtimes that ask for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExecResult:
    exit_code: int
    """128 + n where signal n ended it."""
    stdout: bytes
    stderr: bytes

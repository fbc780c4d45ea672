"""Logging: one logger tree `qvm.*`; only the CLI and the supervisor attach handlers."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s.%(msecs)03d %(levelname)-7s %(name)s: %(message)s"
TIME_FORMAT = "%Y-%m-%dT%H:%M:%S"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module: pass `__name__`."""
    return logging.getLogger(name if name.startswith("qvm") else f"qvm.{name}")


def configure(level: int, *, stream: object | None = None) -> None:
    """Send the `qvm` tree to `stream` (standard error by default) at `level`."""
    handler = logging.StreamHandler(stream)  # type: ignore[arg-type]  # any object with write()
    handler.setFormatter(logging.Formatter(FORMAT, TIME_FORMAT))
    root = logging.getLogger("qvm")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False

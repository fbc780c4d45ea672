"""An Include line at the top of the user's ~/.ssh/config, added and taken away without touching the rest.

It stands first because a line behind `Host` would belong to that host (ssh_config(5)). Pure, on bytes: a file may be in
any encoding and have any line ends.
"""

from __future__ import annotations

from pathlib import Path

MADE = b"# This file was made by qvm and goes when qvm needs it no more, unless something else is written into it.\n"


def include_line(path: Path) -> bytes:
    return f'Include "{path}"\n'.encode()


def add_include(text: bytes | None, path: Path) -> bytes:
    """The file with our line; None: there is no file."""
    line = include_line(path)
    if text is None:
        return MADE + line
    return text if line in text.splitlines(keepends=True) else line + text


def remove_include(text: bytes, path: Path) -> bytes | None:
    """The file as it was without our line; None where it was made for that line alone."""
    line = include_line(path)
    rest = b"".join(each for each in text.splitlines(keepends=True) if each != line)
    return None if rest == MADE else rest

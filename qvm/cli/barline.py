"""One line for one step under way, fitted to the terminal's width. Pure.

What matters least goes first where there is little room: the detail, the bar, the whole's size, the end of the name. A
line is never broken, since a block of changing height flickers and leaves its rests behind.
"""

from __future__ import annotations

from dataclasses import dataclass

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_FRAME = 0.08
"""Seconds that one picture of the spinner lasts."""
_GAP = "  "
_BAR_MOST, _BAR_LEAST = 24, 8
_DETAIL_LEAST = 10
_NAME_LEAST = 20

Piece = tuple[str, str]
"""Text and its style, as rich names styles."""


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    seconds: float
    share: str = ""
    """"45 % of 1.2 GiB"; empty where nothing is known."""
    fraction: float | None = None
    """Of the whole, 0 to 1; None where the whole is not known."""
    detail: str = ""


def fit_line(line: Line, width: int, *, name_width: int = 0) -> list[Piece]:
    """The pieces of the line, `width` columns at most; `name_width` aligns it with its neighbours."""
    spinner = SPINNER[int(line.seconds / _FRAME) % len(SPINNER)]
    clock = _clock(line.seconds)
    left = width - len(spinner) - 1 - len(_GAP) - len(clock)
    share = line.share if line.fraction is None else line.share.partition(" of ")[0]
    if share and left - len(_GAP) - len(share) >= min(_NAME_LEAST, len(line.name)):
        left -= len(_GAP) + len(share)
    else:
        share = ""
    name = shorten(line.name.ljust(min(name_width, left)), max(1, left))
    left -= len(name)
    if share and left >= len(line.share) - len(share):
        left -= len(line.share) - len(share)
        share = line.share
    middle: list[Piece] = [(_GAP + share, "dim")] if share else []
    if line.fraction is not None:
        wish = len(_GAP) + min(len(line.detail), _DETAIL_LEAST) if line.detail else 0
        room = left - len(_GAP) - wish
        if room < _BAR_LEAST:
            room += wish
        if room >= _BAR_LEAST:
            bar = min(_BAR_MOST, room)
            middle = [(_GAP, ""), *_draw_bar(line.fraction, bar), *middle]
            left -= len(_GAP) + bar
    tail: list[Piece] = [(_GAP + clock, "yellow")]
    if line.detail and left >= len(_GAP) + min(len(line.detail), _DETAIL_LEAST):
        tail.append((_GAP + shorten(line.detail, left - len(_GAP)), "dim"))
    return [(spinner, "green"), (f" {name}", ""), *middle, *tail]


def shorten(text: str, width: int) -> str:
    """At most `width` characters, with an ellipsis where some are missing."""
    return text if len(text) <= width else text[: width - 1] + "…"


def _draw_bar(fraction: float, width: int) -> list[Piece]:
    done = int(width * max(0.0, min(1.0, fraction)))
    return [("━" * done, "magenta"), ("─" * (width - done), "bright_black")]


def _clock(seconds: float) -> str:
    """0:01:05, as rich shows it."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"

"""Sizes and times as people write them."""

from __future__ import annotations

import re

KiB = 1024
MiB = 1024 * KiB
GiB = 1024 * MiB
TiB = 1024 * GiB

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$")
_FACTORS = {
    "b": 1,
    "k": KiB, "kb": KiB, "kib": KiB,
    "m": MiB, "mb": MiB, "mib": MiB,
    "g": GiB, "gb": GiB, "gib": GiB,
    "t": TiB, "tb": TiB, "tib": TiB,
}  # fmt: skip


def parse_size(text: str | int | float, *, default_unit: str = "GiB") -> int:
    """Bytes of "4", "4GiB", "512MiB", 1.5 ...; a bare number counts `default_unit`.

    Decimal names (GB) are read as binary ones, as every tool of this field does.
    Raises ValueError with a sentence a user can act on.
    """
    match = _SIZE.match(str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a size; write a number of {default_unit}, or 512MiB, 4GiB")
    number, unit = match.groups()
    factor = _FACTORS.get((unit or default_unit).lower())
    if factor is None:
        raise ValueError(f"{text!r} has an unknown unit {unit!r}; use KiB, MiB, GiB or TiB")
    return int(float(number) * factor)


def format_size(size: int | float) -> str:
    """"1.5 GiB" of a number of bytes; whole numbers carry no decimals."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value == int(value) else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.0f} TiB" if value == int(value) else f"{value:.1f} TiB"


def format_duration(seconds: float) -> str:
    """"850 ms", "12.3 s", "4 min 05 s", "3 h 20 min"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"

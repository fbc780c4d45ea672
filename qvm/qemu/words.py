"""How values are written on QEMU's command line. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

Value = str | int | bool | Path | None


def option(flag: str, head: str, values: Mapping[str, Value] | None = None) -> list[str]:
    """`[flag, "head,key=value,..."]`: booleans as on/off, None left out, commas in values doubled."""
    words = [head, *(f"{key}={_text(value)}" for key, value in (values or {}).items() if value is not None)]
    return [flag, ",".join(word for word in words if word)]


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(",", ",,")

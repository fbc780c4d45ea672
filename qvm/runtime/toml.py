"""TOML of what runtimes' configuration files consist of. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def render_toml(document: Mapping[str, Any]) -> str:
    """TOML of tables, strings, numbers, booleans and flat lists: what these programs' settings consist of.

    JSON's strings and numbers are TOML's too (toml.io/en/v1.0.0: basic strings). ValueError for anything else.
    """
    return "\n".join(_lines(document, ())).lstrip("\n") + "\n"


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    if path and lines:
        lines = ["", f"[{'.'.join(map(_key, path))}]", *lines]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += _lines(value, (*path, key))
    return lines


def _key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else json.dumps(key)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, str | bool | int | float):
        return json.dumps(value)
    raise ValueError(f"{value!r} cannot be written to a TOML file")

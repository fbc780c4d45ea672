"""The settings table in other forms: JSON Schema for editors, Markdown for the documentation. Pure."""

from __future__ import annotations

from typing import Any

from qvm.config.settings import SETTINGS


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a profile file."""
    properties = {}
    for setting in SETTINGS:
        entry = {**setting.kind.schema(), "description": f"{setting.help} ({setting.change.value})"}
        entry["description"] += f"; default: {setting.default_text}"
        if setting.choices is not None:
            entry["examples"] = list(setting.choices())
        elif setting.example:
            entry["examples"] = [setting.example]
        properties[setting.key] = entry
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "qvm profile",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def markdown_table() -> str:
    """The table of settings for the README."""
    rows = ["| flag | file key | default | what it is | later |", "|---|---|---|---|---|"]
    for setting in SETTINGS:
        flags = " ".join(f"`{flag}`" for flag in setting.flags)
        default = setting.default_text + (f" (`{setting.env}`)" if setting.env else "")
        rows.append(f"| {flags} | `{setting.key}` | {default} | {setting.help} | {setting.change.value} |")
    return "\n".join(rows) + "\n"

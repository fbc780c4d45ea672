"""The table itself is sound, and its other forms follow it."""

from __future__ import annotations

import dataclasses
import json

from qvm.config.context import Context
from qvm.config.model import Config
from qvm.config.schema import json_schema, markdown_table
from qvm.config.settings import SETTINGS


def test_rows_are_the_fields_of_config() -> None:
    assert {setting.field for setting in SETTINGS} == {item.name for item in dataclasses.fields(Config)} - {"profile"}


def test_flags_and_keys_are_unique() -> None:
    flags = [flag for setting in SETTINGS for option in setting.flags for flag in option.split("/")]
    assert len(flags) == len(set(flags))
    assert len({setting.key for setting in SETTINGS}) == len(SETTINGS)


def test_examples_can_be_read(tmp_path_factory: object) -> None:
    from pathlib import Path

    context = Context("dev", Path("/"), {"HOME": "/home/me"})
    for setting in SETTINGS:
        if setting.example:
            setting.kind.parse([setting.example] if setting.kind.multiple else setting.example, context)


def test_schema_names_every_key_and_nothing_else() -> None:
    schema = json.loads(json.dumps(json_schema()))
    assert list(schema["properties"]) == [setting.key for setting in SETTINGS]
    assert schema["additionalProperties"] is False
    assert all(entry["description"] for entry in schema["properties"].values())


def test_table_has_a_row_per_setting() -> None:
    assert len(markdown_table().splitlines()) == len(SETTINGS) + 2

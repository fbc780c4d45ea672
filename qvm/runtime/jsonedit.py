"""Change one string at the top level of a JSON document and keep every other byte.

docker's config.json is the user's: key order, indentation, number formats and line ends are nobody else's business.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class _Member:
    key: str
    key_start: int
    key_end: int
    value_start: int
    value_end: int


def get_string(text: str, key: str) -> str | None:
    """The string at `key`; None where the key is absent. ValueError where the text is no JSON object."""
    value = None
    for member in _members(text):
        if member.key == key:
            value = json.loads(text[member.value_start:member.value_end])
    return value if isinstance(value, str) else None


def set_string(text: str, key: str, value: str | None) -> str:
    """The text with `key` set to `value`, or without the key where `value` is None.

    A key that is set and then removed leaves the text as it was. ValueError where the text is no JSON object.
    """
    members = _members(text)
    places = [number for number, member in enumerate(members) if member.key == key]
    if value is None:
        for number in reversed(places):
            text = _without(text, _members(text), number)
        return text
    if places:
        member = members[places[-1]]  # of two equal keys readers take the last
        return text[:member.value_start] + json.dumps(value) + text[member.value_end:]
    if not members:
        brace = text.index("{") + 1
        return f"{text[:brace]}\n\t{json.dumps(key)}: {json.dumps(value)}\n{text[text.rindex('}'):]}"
    first, last = members[0], members[-1]
    between = text[text.index("{") + 1:first.key_start]
    colon = text[first.key_end:first.value_start]
    return f"{text[:last.value_end]},{between}{json.dumps(key)}{colon}{json.dumps(value)}{text[last.value_end:]}"


def _without(text: str, members: list[_Member], number: int) -> str:
    if len(members) == 1:
        return text[:text.index("{") + 1] + text[text.rindex("}"):]
    if number == len(members) - 1:
        return text[:members[number - 1].value_end] + text[members[number].value_end:]
    return text[:members[number].key_start] + text[members[number + 1].key_start:]


def _members(text: str) -> list[_Member]:
    if not isinstance(json.loads(text), dict):
        raise ValueError("not a JSON object")
    members = []
    at = _skip_space(text, text.index("{") + 1)
    while text[at] != "}":
        key, key_end = _DECODER.raw_decode(text, at)
        value_start = _skip_space(text, _skip_space(text, key_end) + 1)
        _, value_end = _DECODER.raw_decode(text, value_start)
        members.append(_Member(key, at, key_end, value_start, value_end))
        at = _skip_space(text, value_end)
        if text[at] == ",":
            at = _skip_space(text, at + 1)
    return members


def _skip_space(text: str, at: int) -> int:
    while text[at] in _SPACE:
        at += 1
    return at

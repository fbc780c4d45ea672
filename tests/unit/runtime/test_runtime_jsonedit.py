from __future__ import annotations

import json

import pytest

from qvm.runtime.jsonedit import get_string, set_string

KEY = "currentContext"
DOCUMENTS = [
    "{}",
    "{}\n",
    " {  } ",
    '{"auths":{}}',
    '{\n\t"auths": {\n\t\t"x": {"auth": "e30="}\n\t},\n\t"credsStore": "pass"\n}',
    '{\r\n    "a" : 1.50,\r\n    "b" : "\\u00e9 }{ \\" ,"\r\n}\r\n',
    '{"b": [1, {"currentContext": "inner"}], "a": null}',
]


@pytest.mark.parametrize("text", [text for text in DOCUMENTS if text != " {  } "])
def test_setting_and_removing_gives_back_the_same_bytes(text: str) -> None:
    changed = set_string(text, KEY, "qvm-dev")
    assert get_string(changed, KEY) == "qvm-dev"
    assert json.loads(changed) == {**json.loads(text), KEY: "qvm-dev"}
    assert set_string(changed, KEY, None) == text


def test_an_empty_object_with_spaces_stays_an_object() -> None:
    assert json.loads(set_string(set_string(" {  } ", KEY, "a"), KEY, None)) == {}


@pytest.mark.parametrize(
    "text",
    [
        '{"currentContext": "mine"}',
        '{"a": 1,\n "currentContext" :"mine" ,\n "z": [ ]}',
        '{"a":1,"currentContext":"mine"}',
    ],
)
def test_replacing_touches_nothing_else(text: str) -> None:
    changed = set_string(text, KEY, "other")
    assert changed == text.replace("mine", "other")
    assert set_string(changed, KEY, "mine") == text


def test_removing_a_key_in_the_middle() -> None:
    text = '{\n  "a": 1,\n  "currentContext": "x",\n  "z": 2\n}'
    assert set_string(text, KEY, None) == '{\n  "a": 1,\n  "z": 2\n}'


def test_of_two_equal_keys_the_last_counts_and_both_go() -> None:
    text = '{"currentContext": "x", "currentContext": "y"}'
    assert get_string(text, KEY) == "y"
    assert json.loads(set_string(text, KEY, None)) == {}


def test_absent_and_non_string_values() -> None:
    assert get_string("{}", KEY) is None
    assert get_string('{"currentContext": null}', KEY) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1,}', '"currentContext"'])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        set_string(text, KEY, "x")

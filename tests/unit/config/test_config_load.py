"""Profile files: form, places, spelling."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvm.config.load import load_settings_file, parse_settings
from qvm.config.settings import BY_KEY

FILE = Path("/p/qvm.yaml")


def test_scalars_keep_their_spelling() -> None:
    loaded, problems = parse_settings(
        "hostname: no\nenv: {ON: yes, N: 012, EMPTY: , TILDE: ~}\nmounts:\n- 12:30\n", FILE, BY_KEY
    )
    assert problems == []
    assert loaded is not None
    assert loaded.values == {
        "hostname": "no", "env": {"ON": "yes", "N": "012", "EMPTY": "", "TILDE": "~"}, "mounts": ["12:30"],
    }  # fmt: skip
    assert loaded.where("env", "N") == "/p/qvm.yaml:2:19"
    assert loaded.where("mounts", 0, "source") == "/p/qvm.yaml:4:3"
    assert loaded.where("cpus") == "/p/qvm.yaml"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null\n"])
def test_an_empty_file_says_nothing(text: str) -> None:
    loaded, problems = parse_settings(text, FILE, BY_KEY)
    assert loaded is not None
    assert (loaded.values, problems) == ({}, [])


def test_a_key_without_value_is_not_given() -> None:
    loaded, problems = parse_settings("cpus:\nmemory: ~\n", FILE, BY_KEY)
    assert loaded is not None
    assert (loaded.values, problems) == ({}, [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cpus: [1\n", "/p/qvm.yaml:2:1: "),
        ("cpus:\t1\n", "/p/qvm.yaml:1:6: "),
        ("- cpus\n", "/p/qvm.yaml:1:1: must be `key: value` lines"),
        ("just words\n", "must be `key: value` lines"),
        ("cpus: 1\n---\ncpus: 2\n", "/p/qvm.yaml:2:1: "),
        ("root-disk: 1\n", "did you mean rootDisk?"),
        ("root_disk: 1\n", "did you mean rootDisk?"),
        ("SSHPORT: 1\n", "did you mean sshPort?"),
        ("zzz: 1\n", "/p/qvm.yaml:1:1: unknown key 'zzz'"),
        ("env:\n  A: 1\n  A: 2\n", "/p/qvm.yaml:3:3: the key 'A' stands in line 2 already"),
        ("? [a]\n: 1\n", "a key must be plain text"),
        ("mounts: &x [*x]\n", "nested too deeply"),
        ("hostname: !!python/object:os.system x\n", ""),
    ],
)
def test_bad_form(text: str, words: str) -> None:
    loaded, problems = parse_settings(text, FILE, BY_KEY)
    if words:
        assert len(problems) == 1
        assert words in problems[0]
    else:
        assert loaded is not None
        assert loaded.values == {"hostname": "x"}  # a tag is a word, never code


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert load_settings_file(tmp_path / "none.yaml", BY_KEY) == (None, [])
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"cpus: \xff\n")
    assert load_settings_file(binary, BY_KEY) == (None, [f"{binary}: is not UTF-8 text (byte 6)"])
    assert load_settings_file(tmp_path, BY_KEY) == (None, [f"{tmp_path}: cannot be read: Is a directory"])

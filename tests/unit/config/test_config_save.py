"""Profile files are written once in full, and later changed line by line."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path
from typing import Any

import pytest

from qvm.config import validate
from qvm.config.resolve import Resolved, resolve_config
from qvm.config.save import save_profile, update_text
from qvm.errors import HostError
from qvm.units import GiB


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QVM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(validate, "host_memory", lambda: 8 * GiB)
    return tmp_path / "home"


def resolve(cwd: Path, **flags: Any) -> Resolved:
    return resolve_config("dev", flags, cwd=cwd, environ={})


def test_what_was_saved_reads_back_the_same(home: Path, tmp_path: Path) -> None:
    (tmp_path / "a b:ö").mkdir()
    first = resolve(
        tmp_path, cpus="3", memory="1.5", env={"YES": "no", "Q": "it's \"x\" # y", "E": ""}, dns=["::1"],
        hostname="on", mounts=[{"source": str(tmp_path / "a b:ö"), "target": "/x", "writable": False}],
    )  # fmt: skip
    assert save_profile(first) == []
    file = home / "dev" / "qvm.yaml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "# Memory, in GiB or with a unit" in file.read_text()
    assert resolve(Path("/")).config == first.config
    assert resolve(Path("/")).explicit.keys() == {item.name for item in dataclasses.fields(first.config)} - {"profile"}


def test_flags_change_an_existing_file_and_nothing_else(home: Path, tmp_path: Path) -> None:
    file = home / "dev" / "qvm.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# mine\ncpus: 2   # two is enough\n\nmounts:\n  - /tmp/gone   # old\n# the end\n")
    assert save_profile(resolve(tmp_path, cpus="4", mounts=["none"], hostname="box")) == []
    assert file.read_text() == "# mine\ncpus: 4   # two is enough\n\nmounts: none   # old\n# the end\nhostname: box\n"


def test_nothing_is_written_where_nothing_changes(home: Path, tmp_path: Path) -> None:
    file = home / "dev" / "qvm.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("cpus: '4'\n")
    before = file.stat().st_ino
    assert save_profile(resolve(tmp_path, cpus="4")) == []
    assert save_profile(resolve(tmp_path)) == []
    assert (file.read_text(), file.stat().st_ino) == ("cpus: '4'\n", before)


def test_a_file_written_in_another_style_is_left_alone(home: Path, tmp_path: Path) -> None:
    file = home / "dev" / "qvm.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("{cpus: 2}\n")
    [note] = save_profile(resolve(tmp_path, cpus="4"))
    assert "could not be changed line by line" in note
    assert file.read_text() == "{cpus: 2}\n"


@pytest.mark.parametrize(
    ("text", "changes", "wanted"),
    [
        ("", {"cpus": 2}, "cpus: 2\n"),
        ("memory: 1", {"cpus": 2}, "memory: 1\ncpus: 2\n"),
        ("env:\n  A: 1\n\n# c\ncpus: 1\n", {"env": {"B": "x"}}, "env:\n  B: x\n\n# c\ncpus: 1\n"),
        ("env: {A: 1}\ncpus: 1\n", {"env": {}}, "env: {}\ncpus: 1\n"),
        ("env:\ncpus: 1\n", {"env": {"A": "1"}}, "env:\n  A: '1'\ncpus: 1\n"),
        ("dns:\n- 1.1.1.1\n- 8.8.8.8\n", {"dns": ["9.9.9.9"]}, "dns:\n- 9.9.9.9\n"),
        ("hostname: >-\n  folded\n  text\ncpus: 1\n", {"hostname": "x"}, "hostname: x\ncpus: 1\n"),
        ("mounts: &m [/a]\n", {"mounts": "none"}, "mounts: none\n"),
    ],
)
def test_lines(text: str, changes: dict[str, Any], wanted: str) -> None:
    assert update_text(text, changes) == wanted


def test_an_alias_elsewhere_is_not_broken() -> None:
    assert update_text("env: &e {A: '1'}\ndns: *e\n", {"env": {"B": "2"}}) is None


def test_a_home_that_cannot_be_written_is_a_host_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QVM_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(HostError):
        save_profile(Resolved(resolve(tmp_path).config, {}))

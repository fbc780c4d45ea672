"""A file replaced in one step."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qvm.paths import replace_file


@pytest.mark.parametrize("durable", [True, False])
def test_content_and_mode_are_the_new_ones(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    held = path.open()
    replace_file(path, b"new", mode=0o640, durable=durable)
    assert path.read_text() == "new" and path.stat().st_mode & 0o7777 == 0o640
    assert held.read() == "old", "who had it open goes on reading what was there"
    held.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_new_file_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        replace_file(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o7777 == 0o600


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError):
        replace_file(tmp_path / "file", b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").is_dir()

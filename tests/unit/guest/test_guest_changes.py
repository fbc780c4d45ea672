"""Which changes of host folders a guest is told of, and when."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qvm.guest.changes import LONGEST, MANY, QUIET, Changes, state_of


def test_a_change_is_told_of_when_the_file_is_quiet() -> None:
    changes = Changes()
    assert changes.next_due() is None
    changes.note(Path("/a"), 10.0)
    changes.note(Path("/a"), 10.03)
    assert changes.next_due() == pytest.approx(10.03 + QUIET)
    assert changes.take_due(10.03) == []
    assert changes.take_due(10.071) == [Path("/a")]
    assert changes.next_due() is None


def test_a_file_that_is_never_quiet_is_told_of_all_the_same() -> None:
    changes, now = Changes(), 10.0
    while not changes.take_due(now):
        changes.note(Path("/log"), now)
        now += 0.01
    assert now == pytest.approx(10.0 + LONGEST, abs=0.02)


def test_what_telling_does_to_a_file_is_no_change(tmp_path: Path) -> None:
    changes, file = Changes(), tmp_path / "f"
    file.write_text("one")
    assert changes.choose([(file, state_of(file))]) == [file]
    found = file.stat()
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))  # as if nothing but its ctime were new
    assert changes.choose([(file, state_of(file))]) == []
    file.write_text("three")
    assert changes.choose([(file, state_of(file))]) == [file]
    file.chmod(0o700)
    assert changes.choose([(file, state_of(file))]) == [file]


def test_what_has_gone_is_told_by_its_folder(tmp_path: Path) -> None:
    changes, file = Changes(), tmp_path / "f"
    file.write_text("one")
    changes.choose([(path, state_of(path)) for path in (file, tmp_path)])
    file.unlink()
    assert changes.choose([(path, state_of(path)) for path in (file, tmp_path)]) == [tmp_path]


def test_of_very_many_files_only_the_folders_are_told() -> None:
    many = [(Path(f"/src/{number % 3}/{number}"), (number, 1, 1, 1)) for number in range(MANY + 1)]
    assert Changes().choose(many) == [Path("/src/0"), Path("/src/1"), Path("/src/2")]
    assert len(Changes().choose(many[1:])) == MANY

"""The agent's side of watched mounts, on folders of this host: what is held, and what a watcher sees."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from guest_agent import load_agent

from qvm.guest import changes


@pytest.fixture(scope="module")
def agent() -> ModuleType:
    return load_agent()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("src/deep", "src/node_modules/dep", "src/.git/objects"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("src/a", "src/deep/b", "src/node_modules/dep/c", "src/.git/HEAD"):
        (tmp_path / name).write_text(name)
    return tmp_path / "src"


@pytest.fixture
def pins(agent: ModuleType, tree: Path) -> Iterator[object]:
    pins = agent.Pins()
    assert pins.hold([str(tree)]) == len(pins.held)
    yield pins
    pins.hold([])
    assert pins.held == {}


def held(pins: object, tree: Path) -> set[str]:
    return {os.path.relpath(path, tree) for path in pins.held}  # type: ignore[attr-defined]


def test_all_but_what_nobody_watches_is_held(agent: ModuleType, pins: object, tree: Path) -> None:
    assert held(pins, tree) == {".", "a", "deep", "deep/b", ".git", "node_modules"}
    assert agent.LEFT_OUT == changes.LEFT_OUT


def test_what_is_new_is_held_before_anybody_hears_of_it_and_what_has_gone_is_let_go(
    pins: object, tree: Path, monkeypatch: pytest.MonkeyPatch, agent: ModuleType
) -> None:
    (tree / "new").mkdir()
    (tree / "new" / "file").touch()
    (tree / "deep" / "b").unlink()
    (tree / "a").unlink()
    (tree / "a").mkdir()
    seen: list[set[str]] = []
    monkeypatch.setattr(agent, "show", lambda path: bool(seen.append(held(pins, tree))) or True)
    names = [str(tree / name) for name in ("new", "new/file", "a", ".")]
    assert pins.changed(names, [str(tree / "deep" / "b")]) == 4  # type: ignore[attr-defined]
    assert {"new", "new/file", "a"} <= seen[0] and "deep/b" not in seen[0]
    assert os.path.isdir(f"/proc/self/fd/{pins.held[str(tree / 'a')]}")  # type: ignore[attr-defined]  # noqa: PTH112


def test_showing_a_change_changes_nothing(agent: ModuleType, tree: Path) -> None:
    file = tree / "a"
    file.chmod(0o640)
    os.utime(file, ns=(1, 1_234_567_891_234_567_891))
    before = changes.state_of(file)
    assert agent.show(str(file)) is True
    assert changes.state_of(file) == before and file.read_text() == "src/a"
    assert agent.show(str(tree / "gone")) is False


def test_what_is_to_be_unmounted_is_let_go(pins: object, tree: Path) -> None:
    pins.release(str(tree / "deep"))  # type: ignore[attr-defined]
    assert held(pins, tree) == {".", "a", ".git", "node_modules"}


def test_an_unmount_ends_who_still_looks_through_the_folder(
    pins: object, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins.release(str(tree))  # type: ignore[attr-defined]
    assert held(pins, tree) == set()
    turns: list[object] = []

    def pin(path: str) -> None:
        turns.append(path)
        pins.turns.clear()  # type: ignore[attr-defined]  # as `release` does, from another thread

    monkeypatch.setattr(pins, "pin", pin)
    pins.fill(str(tree))  # type: ignore[attr-defined]
    assert len(turns) == 1


def test_a_folder_that_has_gone_takes_what_was_below_it_along(pins: object, tree: Path) -> None:
    (tree / "deep" / "b").unlink()
    (tree / "deep").rmdir()
    pins.changed([], [str(tree / "deep")])  # type: ignore[attr-defined]
    assert held(pins, tree) == {".", "a", ".git", "node_modules"}


def test_a_program_is_not_opened_for_writing(agent: ModuleType, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or real(path, *rest))
    (tree / "a").chmod(0o755)
    assert agent.show(str(tree / "a")) is True and opened == []
    assert agent.show(str(tree / "deep" / "b")) is True and opened == [str(tree / "deep" / "b")]

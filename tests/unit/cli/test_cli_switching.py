"""What a start says and does before a stopped instance comes up with another runtime."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qvm.arch import host_arch
from qvm.commands.switching import switch_runtime
from qvm.commands.update import describe_newer_image, find_newer_image
from qvm.config.model import Config
from qvm.image.store import MANIFEST, Image, find_image_by_id, images_dir, set_current
from qvm.instance.record import GuestUser, Record
from qvm.progress import Progress


class Notes(Progress):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    monkeypatch.setenv("QVM_HOME", str(tmp_path / "q"))
    monkeypatch.setenv("QVM_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    config = Config("dev", 1, 1, 1, 1, host_arch().name, "docker", "auto", "debian-13", "dev")
    return Record("u", config, "0" * 16, "m", GuestUser("me", 1, 1, "/home/me"), 0, "tcg", 0.0)


def test_the_old_runtimes_context_goes_and_its_data_is_said_to_stay(record: Record, tmp_path: Path) -> None:
    from qvm.runtime.stack import load_stack
    from qvm.supervisor.context import runtime_context

    docker, context = load_stack(record.config), runtime_context(record)
    (tmp_path / "q" / "dev").mkdir(parents=True)
    docker.activate(context, switch=True)
    context.host_socket("docker").touch()
    assert json.loads((tmp_path / "docker" / "config.json").read_text())["currentContext"] == "qvm-dev"
    notes = Notes()
    switch_runtime(record, replace(record.config, runtime="containerd"), progress=notes)
    assert notes.texts == ["switching from docker to containerd; docker's data stays on the data disk for when you "
                           "switch back"]
    assert not context.host_socket("docker").exists()
    assert "currentContext" not in (tmp_path / "docker" / "config.json").read_text()
    assert not list((tmp_path / "docker" / "contexts" / "meta").iterdir())


def test_nothing_is_said_where_the_runtime_stays(record: Record) -> None:
    notes = Notes()
    switch_runtime(record, record.config, progress=notes)
    assert notes.texts == []


def add_image(digits: str) -> Image:
    folder = images_dir() / digits[:16]
    folder.mkdir(parents=True)
    (folder / "disk.raw").write_text("")
    (folder / MANIFEST).write_text(json.dumps({
        "id": digits, "name": "debian-13", "arch": host_arch().name, "files": {"disk": "disk.raw"}, "format": "raw",
        "cmdline": "", "created": 0,
    }))
    image = find_image_by_id(digits)
    assert image is not None
    return image


def test_an_image_is_newer_where_its_name_stands_for_another_one(record: Record) -> None:
    assert find_newer_image(record) is None and describe_newer_image(record) is None
    old, new = add_image("a" * 64), add_image("b" * 64)
    set_current(old, "key")
    record = replace(record, image_id=old.id)
    assert find_newer_image(record) is None
    set_current(new, "key")
    assert find_newer_image(record) == new.id
    assert "`qvm delete dev -f`" in (describe_newer_image(record) or "")

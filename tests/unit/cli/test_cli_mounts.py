"""`qvm mounts`: what its words mean, what it keeps, and what it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvm.api import VM
from qvm.cli.main import run
from qvm.cli.mounts import render_mounts
from qvm.commands.mounts import MountsResult, add_mounts, mounts, remove_mounts
from qvm.config.model import Config
from qvm.errors import ConfigError, UsageError
from qvm.filenames import Files
from qvm.instance.record import GuestUser, Record
from qvm.instance.store import load_record, save_record
from qvm.units import GiB


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """An instance `dev` that does not run, with a profile file; folders one and two, which is the working one."""
    monkeypatch.setenv("QVM_HOME", str(tmp_path / "q"))
    save_record(Record(
        uuid="8d0e3c50-54c5-4c5f-9d5c-5a3c7b1c2f10",
        config=Config(profile="dev", cpus=1, memory=GiB, disk=GiB, root_disk=GiB, arch="x86_64", runtime="none",
                      accel="tcg", image="debian-13", hostname="dev"),
        image_id="0" * 64, mac="52:54:00:00:00:01", user=GuestUser("ana", 1000, 1000, "/home/ana.guest"),
        ssh_port=2222, accel="tcg", created=0.0,
    ))  # fmt: skip
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "two")
    files = Files("dev")
    files.config.parent.mkdir(parents=True)
    files.config.write_text("cpus: 1  # few\nmounts: none\n")
    return files


def targets() -> list[str]:
    return [str(mount.target) for mount in load_record("dev").config.mounts]


def test_folders_are_kept_in_record_and_file(dev: Files, tmp_path: Path) -> None:
    result = add_mounts("dev", ["../one:/one:ro", "."], cwd=tmp_path / "two")
    assert targets() == ["/one", str(tmp_path / "two")]
    assert [(row["state"], row["writable"]) for row in result.mounts] == [("waiting", False), ("waiting", True)]
    assert f"source: {tmp_path}/one" in dev.config.read_text() and "# few" in dev.config.read_text()
    remove_mounts("dev", ["/one", "."], cwd=tmp_path / "two")
    assert targets() == [] and "mounts: none" in dev.config.read_text()


def test_without_saving_the_profile_stays_as_it_was(dev: Files, tmp_path: Path) -> None:
    before = dev.config.read_text()
    VM("dev").mount(tmp_path / "one", "/one", writable=False)
    assert [row["target"] for row in VM("dev").mounts()] == ["/one"]
    VM("dev").unmount("/one")
    assert dev.config.read_text() == before and targets() == []


@pytest.mark.parametrize("wrong, words", [
    ("../missing", "does not exist"), ("../one:/usr", "belongs to the guest's own system"), ("none", "cannot stand"),
    ("../one:/one", "is the target of"), ("a:b:c:d", "is not SRC"),
])  # fmt: skip
def test_what_cannot_be_mounted_changes_nothing(dev: Files, tmp_path: Path, wrong: str, words: str) -> None:
    add_mounts("dev", [".:/one"], cwd=tmp_path / "two")
    with pytest.raises(ConfigError, match=words):
        add_mounts("dev", ["../one:/fine", wrong], cwd=tmp_path / "two")
    assert targets() == ["/one"]


def test_a_folder_is_removed_by_any_name_that_is_clear(dev: Files, tmp_path: Path) -> None:
    add_mounts("dev", ["../one:/a", "../one:/b", ".:/c"], cwd=tmp_path / "two")
    with pytest.raises(UsageError, match="more than once") as caught:
        remove_mounts("dev", ["../one"], cwd=tmp_path / "two")
    assert caught.value.hint == "name the place: /a, /b"
    remove_mounts("dev", ["../one:/b", "../two"], cwd=tmp_path / "two")
    assert targets() == ["/a"]
    with pytest.raises(UsageError, match="nothing is mounted at /nix"):
        remove_mounts("dev", ["/nix"], cwd=tmp_path)


def test_a_mount_whose_source_has_gone_does_not_keep_others_out(dev: Files, tmp_path: Path) -> None:
    add_mounts("dev", [".:/c"], cwd=tmp_path / "two")
    (tmp_path / "two").rmdir()
    add_mounts("dev", [f"{tmp_path}/one:/a"], cwd=tmp_path)
    assert targets() == ["/c", "/a"]


def test_words_on_the_command_line(dev: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["mounts", "dev", "add", "../one:/one:ro", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["mounts"] == [
        {"source": f"{tmp_path}/one", "target": "/one", "writable": False, "type": "", "state": "waiting",
         "reason": "dev does not run"}]
    assert run(["mounts", "add", "-p", "dev"]) == 2
    assert run(["mounts", "dev", "../one"]) == 2
    assert run(["mounts", "dev", "--force"]) == 2
    assert run(["mounts", "rm", "/one", "-p", "dev"]) == 0
    capsys.readouterr()
    assert run(["mounts", "dev"]) == 0
    assert capsys.readouterr().out == "Nothing is mounted in dev.\n"
    assert mounts("dev").mounts == []


def test_the_table() -> None:
    rows = [{"source": "/a", "target": "/b", "writable": False, "type": "9p", "state": "broken",
             "reason": "/a is gone"}]
    assert render_mounts(MountsResult("dev", rows, ["a note"])).splitlines() == [
        "HOST  VM  ACCESS     TYPE  STATE", "/a    /b  read-only  9p    broken: /a is gone", "a note"]

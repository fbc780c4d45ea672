"""Saved states: whole or not there, used once, never with disks that have moved on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qvm.errors import InstanceStateError, UsageError
from qvm.filenames import Files
from qvm.instance import states
from qvm.instance.settle import settle
from qvm.instance.states import Mark, SavedState, Shape

SHAPE = Shape(2, 2 << 30, 4, (("dimm1", 1 << 30),))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setenv("QVM_HOME", str(tmp_path))
    made = Files("dev")
    made.folder.mkdir(parents=True)
    return made


def make(folder: Path, **values: object) -> SavedState:
    partial = states.begin_state(folder)
    (partial / states.RAM).write_bytes(b"x" * 5000)
    (partial / states.DEVICES).write_bytes(b"d")
    state = SavedState(**{"name": folder.name, "created": 1.0, "host_boot": "this", "disks": {"root": "root-0.qcow2"},
                          "shape": SHAPE, **values})  # type: ignore[arg-type]
    states.seal_state(folder, state)
    return state


def test_what_is_sealed_is_read_back(files: Files) -> None:
    made = make(files.suspended, marks={"root": Mark(1, 2)}, machine="m", streamed=True)
    read = states.load_state(files.suspended)
    assert read.files == {"ram": 5000, "devices": 1}
    assert (read.shape, read.marks, read.streamed, read.machine) == (SHAPE, made.marks, True, "m")
    assert states.find_flaw(files.suspended, read, host_boot="this") is None


def test_a_state_in_the_making_is_none(files: Files) -> None:
    states.begin_state(files.suspended)
    states.begin_state(files.snapshots / "a")
    assert states.find_state(files.suspended) is None and states.list_snapshots("dev") == []
    states.abandon_state(files.suspended)
    assert not any(files.folder.glob(".suspended*"))


def test_after_a_power_loss_only_what_was_synced_counts(files: Files) -> None:
    state = make(files.suspended)
    read = states.load_state(files.suspended)
    assert "host went down" in (states.find_flaw(files.suspended, read, host_boot="next") or "")
    assert settle(files.suspended)
    assert states.find_flaw(files.suspended, read, host_boot="next") is None
    assert state.name == "suspended"


def test_cut_or_missing_files(files: Files) -> None:
    make(files.suspended)
    read = states.load_state(files.suspended)
    os.truncate(files.suspended / states.RAM, 4999)
    assert "cut short" in (states.find_flaw(files.suspended, read, host_boot="this") or "")
    (files.suspended / states.RAM).unlink()
    assert "missing" in (states.find_flaw(files.suspended, read, host_boot="this") or "")


def test_disks_that_were_used_since(files: Files) -> None:
    files.root_disk.write_text("disk")
    make(files.suspended, disks={"root": "root.qcow2"}, marks={"root": states.take_mark(files.root_disk)})
    read = states.load_state(files.suspended)
    flaw = lambda path: states.find_flaw(files.suspended, read, host_boot="this", disks={"root": path})  # noqa: E731
    assert flaw(files.root_disk) is None
    other = files.folder / "root-1.qcow2"
    os.link(files.root_disk, other)
    assert flaw(other) == "the root disk has been used since"
    os.utime(files.root_disk, ns=(1, 1))
    assert flaw(files.root_disk) == "the root disk has been used since"


def test_a_used_state_is_gone_before_its_files(files: Files) -> None:
    make(files.suspended)
    states.consume_state(files.suspended)
    assert states.find_state(files.suspended) is None and (files.suspended / states.RAM).exists()
    assert not settle(files.suspended)
    states.discard_state(files.suspended)
    assert not files.suspended.exists() and not settle(files.suspended)
    states.discard_state(files.suspended)


def test_a_newer_state_takes_an_older_ones_place(files: Files) -> None:
    make(files.suspended, created=1.0)
    make(files.suspended, created=2.0)
    assert states.load_state(files.suspended).created == 2.0


def test_snapshots_in_order_and_what_they_hold_on_to(files: Files) -> None:
    make(files.snapshots / "b", created=1.0, disks={"root": "root-0.qcow2", "data": "data-4.qcow2"})
    make(files.snapshots / "a", created=2.0, disks={"root": "root-1.qcow2"})
    (files.snapshots / "broken").mkdir()
    (files.snapshots / "broken" / states.MANIFEST).write_text("{")
    assert [state.name for state in states.list_snapshots("dev")] == ["b", "a"]
    assert states.used_layers("dev", "root") == ["root-0.qcow2", "root-1.qcow2"]
    assert states.used_layers("dev", "data") == ["data-4.qcow2"]
    states.rename_layer("dev", "root", "root-1.qcow2", "root-0.qcow2")
    assert states.used_layers("dev", "root") == ["root-0.qcow2", "root-0.qcow2"]
    assert states.load_state(files.snapshots / "a").files == {"ram": 5000, "devices": 1}


def test_files_are_lent_not_copied(files: Files) -> None:
    make(files.snapshots / "a")
    states.begin_state(files.suspended)
    states.borrow_state(files.snapshots / "a", files.suspended)
    states.seal_state(files.suspended, SavedState("suspended", 3.0, "this", {}, shape=SHAPE, fresh=True))
    assert (files.suspended / states.RAM).samefile(files.snapshots / "a" / states.RAM)
    states.discard_state(files.snapshots / "a")
    assert (files.suspended / states.RAM).read_bytes() == b"x" * 5000
    assert states.load_state(files.suspended).fresh


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".x", "-x", "a b", "x" * 65])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError):
        states.check_state_name(name)


def test_damage_is_told(files: Files) -> None:
    with pytest.raises(InstanceStateError):
        states.load_state(files.suspended)
    make(files.suspended)
    (files.suspended / states.MANIFEST).write_text('{"version": 1}')
    with pytest.raises(InstanceStateError, match="damaged"):
        states.load_state(files.suspended)


def test_of_a_used_state_the_memory_stays_until_the_machine_ends(files: Files) -> None:
    make(files.suspended)
    (files.suspended / states.dimm_file("dimm1")).write_bytes(b"y")
    states.changes_file(files.suspended / states.RAM).write_bytes(b"z")
    states.mark_synced(files.suspended)
    states.discard_remains(files.suspended)
    assert states.find_state(files.suspended) is not None, "a state is nothing that remained"
    states.consume_state(files.suspended)
    states.keep_memory(files.suspended)
    assert sorted(path.name for path in files.suspended.iterdir()) == ["dimm-dimm1.ram", "ram"]
    assert states.find_state(files.suspended) is None
    states.discard_remains(files.suspended)
    assert not files.suspended.exists()
    states.discard_remains(files.suspended)


def test_a_new_state_takes_the_place_of_what_remained(files: Files) -> None:
    make(files.suspended)
    states.consume_state(files.suspended)
    states.keep_memory(files.suspended)
    make(files.suspended, machine="second")
    assert states.load_state(files.suspended).machine == "second"
    assert (files.suspended / states.DEVICES).exists()


def test_ram_that_is_only_linked_is_not_counted(files: Files, tmp_path: Path) -> None:
    make(files.snapshots / "whole")
    make(files.snapshots / "linked")
    folder = files.snapshots / "linked"
    (tmp_path / "elsewhere").write_bytes(b"r" * (1 << 20))
    (folder / states.RAM).unlink()
    os.link(tmp_path / "elsewhere", folder / states.RAM)
    states.changes_file(folder / states.RAM).write_bytes(b"c" * 5000)
    assert states.state_size(folder) == states.state_size(files.snapshots / "whole")

"""Snapshots, restores and copies of an instance that does not run: real disks, no machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qvm import paths
from qvm.errors import InstanceStateError
from qvm.filenames import Files
from qvm.image.disk import create_disk, create_overlay
from qvm.image.layers import newest
from qvm.instance import states
from qvm.instance.record import write_json
from qvm.instance.states import SavedState, Shape
from qvm.instance.store import remove_instance
from qvm.process import run
from qvm.supervisor import offline
from qvm.supervisor.reviving import find_suspended
from qvm.units import GiB, MiB

pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-img: apt install qemu-utils")

DISKS = ("root", "data")


def path_of(files: Files, name: str) -> Path:
    return files.root_disk if name == "root" else files.data_disk


def write(files: Files, pattern: int) -> None:
    for name in DISKS:
        run(["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} 0 64k", path_of(files, name).resolve()])


def reads(files: Files, pattern: int) -> bool:
    words = [run(["qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {pattern} 0 64k", path_of(files, name).resolve()],
                 check=False).stdout for name in DISKS]  # fmt: skip
    assert all(b"read 65536/65536" in said for said in words)
    return all(b"verification failed" not in said for said in words)


def make(profile: str, base: Path) -> Files:
    files = Files(profile)
    files.folder.mkdir(parents=True)
    paths.data_dir().mkdir(exist_ok=True)
    create_overlay(files.root_disk, backing=base, backing_format="raw", size=8 * MiB)
    create_disk(files.data_disk, 8 * MiB)
    return files


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setenv("QVM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("QVM_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "base.raw").write_bytes(bytes(8 * MiB))
    return make("dev", tmp_path / "base.raw")


def suspend(files: Files) -> None:
    """As if a machine had been suspended."""
    folder = states.begin_state(files.suspended)
    (folder / states.RAM).write_bytes(b"ram")
    (folder / states.DEVICES).write_bytes(b"devices")
    disks = {name: newest(disk) for name, disk in offline.disks_of(files).items()}
    states.seal_state(files.suspended, SavedState(
        "suspended", 1.0, offline.read_boot_id(), {name: path.name for name, path in disks.items()},
        shape=Shape(2, GiB, 4), marks={name: states.take_mark(path) for name, path in disks.items()},
    ))  # fmt: skip


def test_back_and_forth(files: Files) -> None:
    for pattern in (1, 2, 3):
        write(files, pattern)
        if pattern < 3:
            offline.snapshot_stopped("dev", f"s{pattern}")
    for pattern in (1, 2, 1):
        offline.restore("dev", f"s{pattern}")
        assert reads(files, pattern) and not files.restore_plan.exists()
        assert find_suspended("dev") is None
    assert len(list(files.root_layers.iterdir())) == 3  # two that are remembered, one to write to


def test_a_forgotten_snapshot_leaves_nothing(files: Files) -> None:
    for pattern in (1, 2, 3):
        write(files, pattern)
        offline.snapshot_stopped("dev", f"s{pattern}")
    write(files, 4)
    offline.forget("dev", "s2")
    assert [state.name for state in states.list_snapshots("dev")] == ["s1", "s3"]
    assert reads(files, 4)
    offline.forget("dev", "s1")
    offline.restore("dev", "s3")
    assert reads(files, 3)
    offline.forget("dev", "s3")
    assert reads(files, 3) and not files.root_disk.is_symlink() and not files.data_disk.is_symlink()
    assert not files.root_layers.exists() and not files.data_layers.exists()


def test_what_is_suspended_outlives_a_snapshot_and_comes_back_with_it(files: Files) -> None:
    write(files, 1)
    suspend(files)
    state = offline.snapshot_stopped("dev", "s")
    assert state.shape is not None and state.marks is None
    found = find_suspended("dev")
    assert found is not None and found.fresh, "two may go on from it now"
    states.discard_state(files.suspended)
    write(files, 2)
    offline.restore("dev", "s")
    found = find_suspended("dev")
    assert found is not None and found.fresh and not found.renewed and reads(files, 1)
    assert (files.suspended / states.RAM).read_bytes() == b"ram"
    # Once its disks have been written to, it is of no use any more.
    write(files, 3)
    with pytest.raises(InstanceStateError, match="used since"):
        find_suspended("dev")


def test_an_interrupted_restore_is_completed(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    write(files, 1)
    offline.snapshot_stopped("dev", "s")
    write(files, 2)
    put_back, done = offline.put_back, []

    def interrupted(disk: object, top: str) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(top)
        put_back(disk, top)  # type: ignore[arg-type]

    monkeypatch.setattr(offline, "put_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        offline.restore("dev", "s")
    monkeypatch.setattr(offline, "put_back", put_back)
    assert not reads(files, 1) and not reads(files, 2), "one of each: never to be run like that"
    assert offline.finish_restore("dev") == "s"
    assert reads(files, 1) and offline.finish_restore("dev") is None
    write_json(files.restore_plan, {"version": 1, "snapshot": "gone"})
    with pytest.raises(InstanceStateError, match="gone"):
        offline.finish_restore("dev")


def test_a_copy_shares_and_then_goes_its_own_way(files: Files) -> None:
    write(files, 1)
    tops = offline.freeze_disks(files)
    offline.copy_disks("dev", "dev2", tops)
    copy = Files("dev2")
    assert reads(copy, 1) and reads(files, 1)
    assert (copy.root_layers / tops["root"]).samefile(files.root_layers / tops["root"])
    write(copy, 2)
    write(files, 3)
    assert reads(copy, 2) and reads(files, 3)
    # Each is whole without the other, whoever goes first.
    remove_instance("dev", data=True)
    assert reads(copy, 2) and not files.data_disk.exists() and not files.data_layers.exists()
    assert offline.tidy_stopped("dev2") == 2
    assert reads(copy, 2) and not copy.root_disk.is_symlink()


def test_a_copy_of_a_suspended_machine_goes_on_as_another(files: Files) -> None:
    suspend(files)
    state = offline.snapshot_stopped("dev", "tmp")
    offline.copy_disks("dev", "dev2", state.disks)
    offline.copy_state(files.snapshots / "tmp", "dev2", state)
    states.discard_state(files.snapshots / "tmp")
    found = find_suspended("dev2")
    assert found is not None and found.renewed
    assert find_suspended("dev") is not None


def test_a_data_disk_that_outlives_its_instance_is_one_file(files: Files) -> None:
    write(files, 1)
    offline.snapshot_stopped("dev", "s")
    write(files, 2)
    removed, kept = remove_instance("dev", data=False)
    offline.flatten_data("dev")
    assert str(files.data_disk) in kept and str(files.folder) in removed
    assert not files.data_disk.is_symlink() and not files.data_layers.exists()
    said = run(["qemu-io", "-r", "-f", "qcow2", "-c", "read -P 2 0 64k", files.data_disk]).stdout
    assert b"verification failed" not in said


def test_a_data_disk_whose_layers_are_shared_stays_whole(files: Files) -> None:
    write(files, 1)
    offline.copy_disks("dev", "dev2", offline.freeze_disks(files))
    write(files, 2)
    remove_instance("dev", data=False)
    offline.flatten_data("dev")
    said = run(["qemu-io", "-r", "-f", "qcow2", "-c", "read -P 2 0 64k", files.data_disk.resolve()]).stdout
    assert b"verification failed" not in said
    assert reads(Files("dev2"), 1)

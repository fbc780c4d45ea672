"""Layers of a disk, with real qcow2 files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qvm.errors import ImageError
from qvm.image import layers, merge
from qvm.image.disk import create_disk, create_overlay, disk_info, qemu_img
from qvm.image.layers import LayeredDisk
from qvm.process import run
from qvm.units import MiB

pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="needs qemu-img: apt install qemu-utils")

SIZE = 8 * MiB


def write(path: Path, offset: int, pattern: int) -> None:
    run(["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {offset} 64k", path.resolve()])


def reads(path: Path, offset: int, pattern: int) -> bool:
    done = run(["qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {pattern} {offset} 64k", path.resolve()])
    return b"verification failed" not in done.stdout


@pytest.fixture
def disk(tmp_path: Path) -> LayeredDisk:
    """A plain overlay on a raw image that is full of 1."""
    base = tmp_path / "cache" / "base.raw"
    base.parent.mkdir()
    base.write_bytes(b"\1" * SIZE)
    made = LayeredDisk(tmp_path / "a" / "root.qcow2", tmp_path / "a" / "layers", "root")
    made.path.parent.mkdir()
    create_overlay(made.path, backing=base, backing_format="raw", size=SIZE)
    return made


def snapshot(disk: LayeredDisk) -> str:
    top = layers.frozen_name(disk)
    layers.switch(disk, layers.add_layer(disk, top))
    return top.name


def no_states(old: str, new: str) -> None:
    raise AssertionError(f"no state remembers {old}")


def test_a_plain_disk_becomes_layer_0(disk: LayeredDisk) -> None:
    write(disk.path, 0, 2)
    assert layers.newest(disk) == disk.path.resolve() and layers.layers_in(disk) == []
    assert snapshot(disk) == "root-0.qcow2"
    assert disk.path.is_symlink() and layers.newest(disk).name == "root-1.qcow2"
    assert layers.read_header(disk.path).backing == "root-0.qcow2"
    write(disk.path, 0, 3)
    assert reads(disk.path, 0, 3) and reads(disk.path, 64 << 10, 1) and reads(disk.folder / "root-0.qcow2", 0, 2)
    assert disk_info(disk.path).virtual_size == SIZE
    assert [path.name for path in layers.chain_of(layers.newest(disk))] == ["root-1.qcow2", "root-0.qcow2"]


def test_before_the_switch_nothing_has_changed(disk: LayeredDisk) -> None:
    """What an interrupted snapshot leaves is cleared away, and the next one works."""
    layers.add_layer(disk, layers.frozen_name(disk))
    assert not disk.path.is_symlink()
    assert [path.name for path in layers.remove_unused(disk, [])] == ["root-0.qcow2", "root-1.qcow2"]
    assert not disk.folder.exists()
    write(disk.path, 0, 2)
    layers.frozen_name(disk)
    assert snapshot(disk) == "root-0.qcow2"
    assert reads(disk.path, 0, 2)


def test_back_to_a_snapshot_again_and_again(disk: LayeredDisk) -> None:
    write(disk.path, 0, 2)
    top = snapshot(disk)
    for pattern in (3, 4):
        write(disk.path, 0, pattern)
        layers.put_back(disk, top)
        assert reads(disk.path, 0, 2)
        assert len(layers.remove_unused(disk, [top])) == 1
    with pytest.raises(ImageError):
        layers.put_back(disk, "root-77.qcow2")


def test_another_instance_shares_the_layers(disk: LayeredDisk, tmp_path: Path) -> None:
    write(disk.path, 0, 2)
    top = snapshot(disk)
    other = LayeredDisk(tmp_path / "b" / "root.qcow2", tmp_path / "b" / "layers", "root")
    layers.link_chain(disk.folder / top, other)
    write(other.path, 0, 3)
    write(disk.path, 0, 4)
    assert reads(other.path, 0, 3) and reads(disk.path, 0, 4)
    assert reads(other.path, 64 << 10, 1)
    # What is shared is written to by neither; when one of them goes, the other may.
    work = merge.plan_merge(disk, [])
    assert work is not None and not work.down
    shutil.rmtree(other.folder)
    work = merge.plan_merge(disk, [])
    assert work is not None and work.down


def four_layers(disk: LayeredDisk) -> list[str]:
    """Block n of 64 KiB was last written in layer n."""
    tops = []
    for number in range(4):
        write(disk.path, number << 16, 10 + number)
        write(disk.path, 7 << 16, 20 + number)
        if number < 3:
            tops.append(snapshot(disk))
    return tops


def holds(path: Path, upto: int) -> bool:
    return reads(path, 7 << 16, 20 + upto) and all(
        reads(path, number << 16, 10 + number if number <= upto else 1) for number in range(4)
    )


def test_what_no_snapshot_needs_is_merged(disk: LayeredDisk) -> None:
    tops = four_layers(disk)
    assert merge.plan_merge(disk, tops) is None
    renamed: list[tuple[str, str]] = []
    assert merge.merge_all(disk, [tops[1]], renamed=lambda old, new: renamed.append((old, new))) == 2
    # The snapshot's layer went down into layer 0, the newest down into its neighbour.
    assert ("root-1.qcow2", "root-0.qcow2") in renamed
    assert len(layers.chain_of(layers.newest(disk))) == 2 and len(layers.layers_in(disk)) == 2
    assert holds(disk.path, 3) and holds(disk.folder / "root-0.qcow2", 1)
    assert merge.merge_all(disk, [], renamed=lambda old, new: None) == 1
    assert holds(disk.path, 3)
    assert merge.make_plain(disk) and not disk.path.is_symlink() and not disk.folder.exists()
    assert holds(disk.path, 3)


def test_shared_layers_are_merged_up(disk: LayeredDisk, tmp_path: Path) -> None:
    tops = four_layers(disk)
    other = LayeredDisk(tmp_path / "b" / "root.qcow2", tmp_path / "b" / "layers", "root")
    layers.link_chain(disk.folder / tops[-1], other)
    assert merge.merge_all(disk, [], renamed=no_states) == 3
    assert holds(disk.path, 3) and merge.make_plain(disk)
    assert holds(other.path, 2)
    assert not merge.make_plain(other)


def test_a_branch_keeps_what_it_stands_on(disk: LayeredDisk) -> None:
    tops = four_layers(disk)
    layers.put_back(disk, tops[0])
    # tops[2] is on the branch that was left; layer 0 is below both.
    assert layers.find_unused(disk, [tops[2]]) == [disk.folder / "root-3.qcow2"]
    layers.remove_unused(disk, [tops[2]])
    assert merge.plan_merge(disk, [tops[2]]) is None
    assert holds(disk.folder / tops[2], 2) and reads(disk.path, 0, 10) and reads(disk.path, 1 << 16, 1)


def test_merges_of_a_running_machine_go_into_its_newest_layer(disk: LayeredDisk) -> None:
    tops = four_layers(disk)
    work = merge.plan_merge(disk, tops[:2], running=True)
    assert work is not None and (work.upper.name, work.lower.name, work.down) == ("root-3.qcow2", tops[2], False)
    assert merge.plan_merge(disk, [tops[2]], running=True) is None


def test_a_data_disk_without_any_base(tmp_path: Path) -> None:
    disk = LayeredDisk(tmp_path / "dev.qcow2", tmp_path / "dev.layers", "data")
    create_disk(disk.path, SIZE)
    write(disk.path, 0, 5)
    top = snapshot(disk)
    write(disk.path, 1 << 16, 6)
    other = LayeredDisk(tmp_path / "dev2.qcow2", tmp_path / "dev2.layers", "data")
    layers.link_chain(disk.folder / top, other)
    assert merge.merge_all(disk, [], renamed=no_states) == 1
    assert reads(disk.path, 0, 5) and reads(disk.path, 1 << 16, 6) and disk_info(disk.path).backing is None
    assert reads(other.path, 0, 5)


def test_grown_disks_merge(disk: LayeredDisk) -> None:
    snapshot(disk)
    qemu_img("resize", "-q", "-f", "qcow2", layers.newest(disk), str(2 * SIZE))
    write(disk.path, SIZE + 65536, 9)
    merge.merge_all(disk, [], renamed=no_states)
    assert disk_info(disk.path).virtual_size == 2 * SIZE and reads(disk.path, SIZE + 65536, 9)


def test_what_is_no_qcow2(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"QFI")
    with pytest.raises(ImageError):
        layers.read_header(tmp_path / "x")
    with pytest.raises(ImageError):
        layers.read_header(tmp_path / "missing")

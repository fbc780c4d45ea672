"""The RAM saver on a process of our own that changes its memory as a machine does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from memory_child import CHANGES, SIZE, child, expected, make_base

from qvm.errors import QemuError
from qvm.qemu.ram import can_read_memory, copy_sparse, find_mapping, save_changed
from qvm.units import MiB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets us read another process's memory")

@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "ram of a machine")


def test_a_private_mapping_is_saved_whole_by_its_changes(base: Path, tmp_path: Path) -> None:
    content = base.read_bytes()
    with child(str(base)) as process:
        assert can_read_memory(process.pid) is None
        for line in CHANGES:
            process.do(line)
        mapping = find_mapping(process.pid, base)
        assert mapping is not None and mapping.start == process.address and mapping.end - mapping.start == SIZE
        copy_sparse(base, tmp_path / "saved")
        read = save_changed(process.pid, mapping.start, SIZE, tmp_path / "saved")
    assert (tmp_path / "saved").read_bytes() == expected(content)
    assert base.read_bytes() == content
    assert 4 * MiB < read < 16 * MiB  # 4 MiB in two pieces, 500 pages near each other with small gaps or none


def test_a_deleted_file_and_a_mapping_in_pieces_are_found(base: Path) -> None:
    with child(str(base)) as process:
        process.do("area.madvise(mmap.MADV_DONTFORK, 8 << 20, 4 << 20)")
        base.unlink()
        mapping = find_mapping(process.pid, base)
        assert mapping is not None
        assert (mapping.start, mapping.end - mapping.start) == (process.address, SIZE)
        assert find_mapping(process.pid, base.with_name("another")) is None


def test_anonymous_memory_becomes_a_sparse_file(tmp_path: Path) -> None:
    with child() as process:
        for line in CHANGES:
            process.do(line)
        save_changed(process.pid, process.address, SIZE, tmp_path / "saved")
    assert (tmp_path / "saved").read_bytes() == expected(bytes(SIZE))
    assert (tmp_path / "saved").stat().st_blocks * 512 < 48 * MiB


def test_saving_again_over_an_older_copy(base: Path, tmp_path: Path) -> None:
    """A machine that is frozen, runs on, and is frozen again: the second file holds the second instant."""
    with child(str(base)) as process:
        process.do("area[12 << 20:13 << 20] = b'1' * (1 << 20)")
        copy_sparse(base, tmp_path / "one")
        save_changed(process.pid, process.address, SIZE, tmp_path / "one")
        process.do("area[12 << 20:13 << 20] = bytes(1 << 20)")
        copy_sparse(base, tmp_path / "two")
        save_changed(process.pid, process.address, SIZE, tmp_path / "two")
    one, two = (tmp_path / "one").read_bytes(), (tmp_path / "two").read_bytes()
    assert one[12 * MiB : 13 * MiB] == b"1" * MiB
    assert two[12 * MiB : 13 * MiB] == bytes(MiB)


def test_memory_that_is_not_there(tmp_path: Path) -> None:
    with child() as process, pytest.raises(QemuError):
        save_changed(process.pid, 0x7FFF_FFFF_0000_0000, SIZE, tmp_path / "saved")

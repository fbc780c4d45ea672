"""RAM saving, the parts that are pure or only need files."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from qvm.qemu import ram
from qvm.units import KiB, MiB


def entries(*tops: int) -> bytes:
    return b"".join(struct.pack("<Q", top << 56 | 0x1234) for top in tops)


FILE, ANON, SWAP, NONE = 0xA1, 0x81, 0x40, 0x00


def test_present_anonymous_and_swapped_pages_count_as_changed() -> None:
    assert ram.changed_runs(entries(FILE, ANON, ANON, FILE)) == [(1, 3)]
    assert ram.changed_runs(entries(NONE, SWAP)) == [(1, 2)]
    assert ram.changed_runs(entries(0x80, 0x9F, 0x60, 0xC0)) == [(0, 4)]
    assert ram.changed_runs(entries(NONE, FILE, 0x20, 0xA0, 0xBF)) == []
    assert ram.changed_runs(b"") == []


def test_near_runs_are_joined_and_far_ones_are_not() -> None:
    assert ram.changed_runs(entries(ANON, *[NONE] * 8, ANON)) == [(0, 10)]
    assert ram.changed_runs(entries(ANON, *[NONE] * 9, ANON)) == [(0, 1), (10, 11)]
    # A newline byte is a page like any other.
    assert ram.changed_runs(entries(ANON, 0x0A, ANON)) == [(0, 3)]


def test_a_hundred_thousand_pages_with_many_runs() -> None:
    pattern = entries(*([ANON] + [NONE] * 15)) * 8192
    assert ram.changed_runs(pattern) == [(number * 16, number * 16 + 1) for number in range(8192)]


def test_map_lines() -> None:
    line = "7f1200000000-7f1280000000 rw-p 00001000 fe:00 42                         /a b/ram"
    assert ram._parse_map_line(line, "/a b/ram") == ram.Mapping(0x7F1200000000, 0x7F1280000000, 0x1000)
    assert ram._parse_map_line(line + " (deleted)", "/a b/ram") is not None
    assert ram._parse_map_line(line + "x", "/a b/ram") is None
    assert ram._parse_map_line("7f12-7f13 rw-p 00000000 00:00 0 ", "/a b/ram") is None


def sparse_file(path: Path) -> bytes:
    with path.open("wb") as file:
        file.truncate(4 * MiB)
        file.seek(1 * MiB)
        file.write(b"a" * 10000)
        file.seek(3 * MiB + 5)
        file.write(b"b")
    return path.read_bytes()


def used(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_copy_keeps_content_and_holes(tmp_path: Path) -> None:
    content = sparse_file(tmp_path / "from")
    ram.copy_sparse(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to").read_bytes() == content
    assert used(tmp_path / "to") <= used(tmp_path / "from")
    assert (tmp_path / "to").stat().st_mode & 0o777 == 0o600


def test_a_copy_without_help_of_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = sparse_file(tmp_path / "from")
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.setattr(ram, "data_extents", lambda fd: iter([(0, os.fstat(fd).st_size)]))
    ram.copy_sparse(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to").read_bytes() == content
    assert used(tmp_path / "to") <= 2 * 64 * KiB  # two pieces of data, a grain each


def test_an_empty_file_and_a_file_of_nothing_but_hole(tmp_path: Path) -> None:
    for size in (0, 1 * MiB):
        with (tmp_path / "from").open("wb") as file:
            file.truncate(size)
        ram.copy_sparse(tmp_path / "from", tmp_path / "to")
        assert (tmp_path / "to").stat().st_size == size
        assert used(tmp_path / "to") == 0


def test_zeros_replace_old_data_but_make_no_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = sparse_file(path)
    before = used(path)
    fd = os.open(path, os.O_RDWR)
    ram.write_sparse(fd, bytes(3 * MiB), 7, over=True)
    os.close(fd)
    assert path.read_bytes() == content[:7] + bytes(3 * MiB) + content[7 + 3 * MiB :]
    assert used(path) <= before + 64 * KiB


@pytest.mark.parametrize("offset", [0, 1, 4096, 65535])
def test_data_between_zeros_lands_where_it_belongs(tmp_path: Path, offset: int) -> None:
    data = bytes(100 * KiB) + b"x" * 5000 + bytes(200 * KiB) + b"y"
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    ram.write_sparse(fd, data, offset, over=False)
    assert os.pread(fd, len(data), offset) == data
    os.close(fd)


def test_where_memory_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ram.can_read_memory(os.getpid()) is None
    assert "has gone" in (ram.can_read_memory(2**22 + 5) or "")
    monkeypatch.setattr(ram.sys, "platform", "darwin")
    assert "does not let" in (ram.can_read_memory(os.getpid()) or "")

"""The RAM saver on a process of our own that changes its memory as a machine does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qvm.errors import QemuError
from qvm.qemu.ram import can_read_memory, copy_sparse, find_mapping, save_changed
from qvm.units import MiB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets us read another process's memory")

SIZE = 64 * MiB

# Maps SIZE bytes (a file privately where one is named, else anonymous), does to them what its input says,
# and tells the address.
CHILD = """
import ctypes, mmap, sys
size = int(sys.argv[1])
if len(sys.argv) > 2:
    file = open(sys.argv[2], "r+b")
    area = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
else:
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print(ctypes.addressof(ctypes.c_char.from_buffer(area)), flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Child:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid
        assert process.stdout is not None
        self.address = int(process.stdout.readline())

    def do(self, line: str) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n"


@contextmanager
def child(*words: str) -> Iterator[Child]:
    with subprocess.Popen([sys.executable, "-c", CHILD, str(SIZE), *words], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:  # fmt: skip
        yield Child(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "ram of a machine"
    with path.open("wb") as file:
        file.truncate(SIZE)
        file.seek(10 * MiB)
        file.write(os.urandom(20 * MiB))
    return path


CHANGES = (
    "area[0:5] = b'first'",
    "area[11 << 20:12 << 20] = b'z' * (1 << 20)",
    "area[15 << 20:18 << 20] = bytes(3 << 20)",
    "area[size - 3:] = b'end'",
    "[area.__setitem__(50000000 + n * 20000, 7) for n in range(500)]",
    "sum(area[n] for n in range(0, size, 4096))",
)


def expected(content: bytes) -> bytes:
    area = bytearray(content)
    size = len(area)
    for line in CHANGES:
        exec(line, {"area": area, "size": size})
    return bytes(area)


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

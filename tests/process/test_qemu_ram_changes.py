"""What a process has changed of a mapped file goes into a file of its own, and from there into another process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from memory_child import CHANGES, SIZE, Child, child, expected, make_base

from qvm.errors import QemuError
from qvm.qemu.ramchanges import count_changed, link_open_file, load_changes, save_changes
from qvm.units import MiB


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "ram of a machine")


def read_all(process: Child) -> bytes:
    with Path(f"/proc/{process.pid}/mem").open("rb", buffering=0) as memory:
        return os.pread(memory.fileno(), SIZE, process.address)


def test_changes_go_over_into_another_process(base: Path, tmp_path: Path) -> None:
    content, saved = base.read_bytes(), tmp_path / "changes"
    with child(str(base)) as process:
        process.do("area[40 << 20:41 << 20] = b'a' * (1 << 20)")
        early = save_changes(process.pid, process.address, SIZE, saved)
        for line in CHANGES:
            process.do(line)
        late = save_changes(process.pid, process.address, SIZE, saved)
        assert early < late == count_changed(process.pid, process.address, SIZE)
    assert late < saved.stat().st_size < late + MiB, "nothing is left of what was saved before, and no unchanged page"
    with child(str(base)) as process:
        assert load_changes(process.pid, process.address, SIZE, saved) == late
        found = read_all(process)
    assert found == expected(content[: 40 * MiB] + b"a" * MiB + content[41 * MiB :])
    assert base.read_bytes() == content, "the file that both have mapped is as it was"


def test_memory_that_became_zeros_again(base: Path, tmp_path: Path) -> None:
    with child(str(base)) as process:
        process.do("area[12 << 20:14 << 20] = bytes(2 << 20)")
        save_changes(process.pid, process.address, SIZE, tmp_path / "changes")
    with child(str(base)) as process:
        load_changes(process.pid, process.address, SIZE, tmp_path / "changes")
        found = read_all(process)
    content = base.read_bytes()
    assert found == content[: 12 * MiB] + bytes(2 * MiB) + content[14 * MiB :]


def test_nothing_changed(base: Path, tmp_path: Path) -> None:
    with child(str(base)) as process:
        assert save_changes(process.pid, process.address, SIZE, tmp_path / "changes") == 0
        assert load_changes(process.pid, process.address, SIZE, tmp_path / "changes") == 0


@pytest.mark.parametrize("damage", ["cut", "another size", "index", "empty"])
def test_a_damaged_file_is_refused_before_anything_is_written(base: Path, tmp_path: Path, damage: str) -> None:
    saved = tmp_path / "changes"
    with child(str(base)) as process:
        process.do("area[0:8] = b'12345678'")
        save_changes(process.pid, process.address, SIZE, saved)
        process.do("area[0:8] = b'--------'")
        data = bytearray(saved.read_bytes())
        if damage == "index":
            data[4096:4104] = (SIZE - 100).to_bytes(8, "little")  # a run that would go beyond the RAM
        saved.write_bytes({"cut": data[:-5], "empty": b""}.get(damage, bytes(data)))
        with pytest.raises(QemuError, match="cannot be used"):
            load_changes(process.pid, process.address, SIZE * 2 if damage == "another size" else SIZE, saved)
        assert read_all(process)[:8] == b"--------"


def test_a_process_that_has_no_memory_there(base: Path, tmp_path: Path) -> None:
    with child(str(base)) as process:
        process.do("area[0:8] = b'12345678'")
        save_changes(process.pid, process.address, SIZE, tmp_path / "changes")
        with pytest.raises(QemuError, match="cannot be used"):
            load_changes(process.pid, 0x7FFF_FFFF_0000_0000, SIZE, tmp_path / "changes")


def test_an_open_file_gets_another_name_while_it_has_one(tmp_path: Path) -> None:
    path, other, third = tmp_path / "one", tmp_path / "two", tmp_path / "three"
    path.write_text("content")
    with path.open() as file:
        assert link_open_file(Path(f"/proc/{os.getpid()}/fd/{file.fileno()}"), other)
        path.unlink()
        assert link_open_file(Path(f"/proc/{os.getpid()}/fd/{file.fileno()}"), third), "by its second name"
        other.unlink()
        third.unlink()
        assert not link_open_file(Path(f"/proc/{os.getpid()}/fd/{file.fileno()}"), other)
    assert not other.exists()


def test_another_file_system_has_no_such_names(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system at /dev/shm")
    (tmp_path / "one").write_text("content")
    with (tmp_path / "one").open() as file:
        assert not link_open_file(Path(f"/proc/{os.getpid()}/fd/{file.fileno()}"), elsewhere / f"qvm-{os.getpid()}")

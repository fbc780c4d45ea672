"""Warm images in the cache: which count, which are kept, which go."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qvm.errors import HostError, QvmError
from qvm.warm import store
from qvm.warm.store import WarmImage, discard_warm, find_warm, list_warm, pin, prune_warm, remove_warm, sweep, using

KB = 4096


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QVM_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QVM_WARM_LIMIT", raising=False)
    monkeypatch.setattr(store, "read_boot_id", lambda: "this-boot")
    return tmp_path / "cache" / "warm"


def make(cache: Path, key: str, *, used: float = 1000.0, size: int = 16 * KB, synced: bool = True,
         **changes: Any) -> WarmImage:
    folder = cache / f"{key}-0001"
    folder.mkdir(parents=True)
    for name in ("root.qcow2", "data.qcow2", "devices"):
        (folder / name).write_bytes(b"x")
    (folder / "ram").write_bytes(b"r" * size)
    if synced:
        (folder / "synced").touch()
    manifest = {
        "version": 1, "title": f"warm {key}", "stage": "runtime", "image": "0" * 64, "arch": "x86_64",
        "runtime": "docker", "runtime_version": "docker 1", "cpus": 2, "memory": 2 << 30, "mount_slots": 4,
        "files": {"root.qcow2": 1, "data.qcow2": 1, "devices": 1, "ram": size}, "host_boot": "this-boot",
        "created": 1.0, **changes,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    os.utime(folder / "manifest.json", (used, used))
    found = find_warm(key)
    return found if found is not None else WarmImage(key, folder, manifest)


def test_found_by_its_key_alone(cache: Path) -> None:
    make(cache, "aaaa")
    assert find_warm("bbbb") is None
    found = find_warm("aaaa")
    assert found is not None and found.title == "warm aaaa" and [entry.key for entry in list_warm()] == ["aaaa"]


@pytest.mark.parametrize("name", ["ram", "devices", "root.qcow2"])
def test_a_file_of_another_size_makes_it_no_warm_image(cache: Path, name: str) -> None:
    warm = make(cache, "aaaa")
    os.truncate(warm.folder / name, 7)
    assert find_warm("aaaa") is None and list_warm() == []


def test_a_missing_file_or_a_damaged_manifest_makes_it_none(cache: Path) -> None:
    warm = make(cache, "aaaa")
    warm.devices.unlink()
    assert find_warm("aaaa") is None
    other = make(cache, "bbbb")
    (other.folder / "manifest.json").write_text("{")
    assert find_warm("bbbb") is None


def test_what_may_not_have_reached_the_disk_counts_until_the_host_boots_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(cache, "aaaa", synced=False)
    make(cache, "bbbb", synced=True)
    assert find_warm("aaaa") is not None
    monkeypatch.setattr(store, "read_boot_id", lambda: "another-boot")
    assert find_warm("aaaa") is None and find_warm("bbbb") is not None


def test_one_that_carries_a_disk_is_in_use_until_the_disk_goes(cache: Path, tmp_path: Path) -> None:
    warm, disk = make(cache, "aaaa"), tmp_path / "root.qcow2"
    disk.touch()
    pin(warm, disk)
    assert warm.describe()["in_use"] and not remove_warm(warm)
    disk.unlink()
    assert not warm.describe()["in_use"] and remove_warm(warm) and not warm.folder.exists()


def test_one_that_is_being_used_is_not_removed(cache: Path) -> None:
    warm = make(cache, "aaaa")
    with using(warm):
        assert warm.describe()["in_use"] and not remove_warm(warm)
    assert remove_warm(warm)


def test_one_that_went_meanwhile_cannot_be_used(cache: Path) -> None:
    warm = make(cache, "aaaa")
    assert remove_warm(warm)
    with pytest.raises(HostError, match="removed meanwhile"), using(warm):
        pytest.fail("there is nothing to use")


def test_what_was_used_longest_ago_goes_first(cache: Path, tmp_path: Path) -> None:
    make(cache, "old1", used=100.0)
    pinned = make(cache, "old2", used=200.0)
    make(cache, "new1", used=900.0)
    make(cache, "new2", used=950.0)
    (tmp_path / "disk").touch()
    pin(pinned, tmp_path / "disk")
    one = pinned.size()
    gone = prune_warm(limit=2 * one + KB, keep="new1")
    assert [warm.key for warm in gone] == ["old1", "new2"]
    assert sorted(warm.key for warm in list_warm()) == ["new1", "old2"]


def test_using_one_makes_it_the_last_used(cache: Path) -> None:
    first = make(cache, "aaaa", used=100.0)
    make(cache, "bbbb", used=200.0)
    with using(first):
        pass
    assert [warm.key for warm in prune_warm(limit=first.size() + KB)] == ["bbbb"]


def test_nothing_goes_below_the_limit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(cache, "aaaa")
    assert prune_warm() == []
    monkeypatch.setenv("QVM_WARM_LIMIT", "0")
    assert [warm.key for warm in prune_warm()] == ["aaaa"]
    monkeypatch.setenv("QVM_WARM_LIMIT", "much")
    with pytest.raises(QvmError, match="no number of bytes"):
        prune_warm()


def test_one_that_failed_is_not_found_again_but_carries_its_disks(cache: Path, tmp_path: Path) -> None:
    warm = make(cache, "aaaa")
    (tmp_path / "disk").touch()
    pin(warm, tmp_path / "disk")
    discard_warm(warm)
    assert find_warm("aaaa") is None and warm.root_disk.exists()
    (tmp_path / "disk").unlink()
    prune_warm()
    assert not warm.folder.exists()


def test_what_a_killed_maker_left_is_swept(cache: Path) -> None:
    make(cache, "aaaa")
    (cache / ".aaaa-1234").mkdir()
    (cache / ".bbbb-1234").mkdir()
    sweep("aaaa")
    assert sorted(entry.name for entry in cache.iterdir()) == [".bbbb-1234", "aaaa-0001"]

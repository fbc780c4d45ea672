"""The store: ids by content, references, damage, removal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qvm.arch import AARCH64, X86_64
from qvm.errors import ImageError, InstanceStateError
from qvm.image import ensure, rootfs, store
from qvm.image.catalogue import find_entry
from qvm.image.store import Image


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QVM_CACHE_HOME", str(tmp_path))
    store.images_dir().mkdir()
    return tmp_path


def make(content: bytes = b"disk", name: str = "debian-13", key: str = "key") -> Image:
    folder = store.images_dir() / ".building"
    folder.mkdir()
    (folder / "disk.raw").write_bytes(content)
    (folder / "vmlinuz").write_bytes(b"kernel")
    (folder / "initrd").write_bytes(b"initrd")
    manifest = {
        "name": name, "arch": "x86_64", "format": "raw", "cmdline": "root=/dev/vda", "source": "test",
        "files": {"disk": "disk.raw", "kernel": "vmlinuz", "initrd": "initrd"},
    }  # fmt: skip
    return store.publish(folder, store.seal(folder, manifest), key=key)


def test_round_trip() -> None:
    image = make()
    assert store.load_image(image.id) == image
    assert image.disk.read_bytes() == b"disk" and image.format == "raw"
    assert image.folder.name == image.id[:16]
    assert image.disk.stat().st_mode & 0o222 == 0
    assert image.describe()["state"] == "ready"
    assert not (store.images_dir() / ".building").exists()


def test_same_content_same_id() -> None:
    first = make()
    assert make().id == first.id
    assert make(b"other").id != first.id
    assert len(store.list_images()) == 2


def test_reference_counts_only_for_its_key() -> None:
    image = make()
    assert store.find_current("debian-13", X86_64, "key") == image
    assert store.find_current("debian-13", X86_64, "newer recipe") is None
    assert store.find_current("debian-13", AARCH64, "key") is None


def test_holes_and_zeros_are_alike(tmp_path: Path) -> None:
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    dense.write_bytes(bytes(3 << 20) + b"end")
    with sparse.open("wb") as file:
        file.seek(3 << 20)
        file.write(b"end")
    assert store.digest_file(sparse) == store.digest_file(dense)
    with dense.open("r+b") as file:
        file.write(b"x")
    assert store.digest_file(sparse) != store.digest_file(dense)


def test_lengths_count(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(10))
    (tmp_path / "b").write_bytes(bytes(20))
    assert store.digest_file(tmp_path / "a") != store.digest_file(tmp_path / "b")


@pytest.mark.parametrize("victim", ["disk.raw", "vmlinuz", "manifest.json"])
def test_damaged_image_is_none(victim: str) -> None:
    image = make()
    (image.folder / victim).unlink()
    assert store.list_images() == []
    assert store.find_current("debian-13", X86_64, "key") is None
    with pytest.raises(ImageError, match="not in the cache"):
        store.load_image(image.id)


def test_garbage_manifest_and_reference_are_none() -> None:
    image = make()
    (image.folder / "manifest.json").chmod(0o600)
    (image.folder / "manifest.json").write_text("{")
    assert store.list_images() == []
    (store.images_dir() / "refs" / "debian-13-x86_64.json").write_text("[]")
    assert store.find_current("debian-13", X86_64, "key") is None


def test_half_made_folders_are_never_images() -> None:
    folder = store.images_dir() / ".building-debian-13-x86_64"
    folder.mkdir()
    (folder / "disk.raw").write_bytes(b"half")
    (folder / "manifest.json").write_text(json.dumps({"version": 1}))
    assert store.list_images() == []


def test_find_by_part_of_the_id() -> None:
    image = make()
    for digits in (8, 16, 20, 64):
        found = store.find_image_by_id(image.id[:digits])
        assert found is not None and found.id == image.id
    assert store.find_image_by_id(image.id[:4]) is None
    assert store.find_image_by_id("../../../etc") is None
    assert store.find_image_by_id(image.id[:16] + "0" * 48) is None


def test_what_an_accelerator_is_proven_with() -> None:
    foreign = make_foreign()
    assert store.find_proof_files(foreign) == (None, None)
    own = make()
    assert store.find_proof_files(own) == store.find_proof_files(foreign) == (own.kernel, own.initrd)


def make_foreign() -> Image:
    folder = store.images_dir() / ".fetching"
    folder.mkdir()
    (folder / "disk.raw").write_bytes(b"disk")
    manifest = {"name": "mine", "arch": "x86_64", "format": "raw", "cmdline": "", "files": {"disk": "disk.raw"}}
    return store.publish(folder, store.seal(folder, manifest), key="imported")


def test_remove_by_name_and_id() -> None:
    first, second = make(b"1"), make(b"2")
    third = make(b"3", name="other")
    assert [row["id"] for row in store.remove_images(third.id[:12], in_use={})] == [third.id]
    assert {row["id"] for row in store.remove_images("debian-13", in_use={})} == {first.id, second.id}
    assert store.list_images() == []


def test_image_in_use_stays() -> None:
    first, second = make(b"1"), make(b"2")
    with pytest.raises(InstanceStateError, match="'dev'") as caught:
        store.remove_images("debian-13", in_use={second.id: "dev"})
    assert "qvm delete dev" in (caught.value.hint or "")
    assert len(store.list_images()) == 2
    with pytest.raises(InstanceStateError):
        store.remove_image(first.id, in_use={first.id})


def test_prune_keeps_what_is_current_or_in_use() -> None:
    entry = find_entry("debian-13", X86_64)
    assert entry is not None
    old, used = make(b"old"), make(b"used")
    current = make(b"new", key=ensure.current_key(entry))
    stale = rootfs.bases_dir() / "0123456789abcdef"
    stale.mkdir(parents=True)
    assert [row["id"] for row in ensure.prune_images(in_use={used.id: "dev"})] == [old.id]
    assert {image.id for image in store.list_images()} == {used.id, current.id}
    assert not stale.exists()


def test_listing_shows_every_name_and_what_is_outdated() -> None:
    old = make(b"old")
    rows = ensure.describe_images()
    assert [row["id"] for row in rows if row["state"] == "outdated"] == [old.id]
    assert {row["name"] for row in rows if row["state"] == "absent"} >= {"debian-13", "debian-13-cloud"}


def test_remove_unknown() -> None:
    with pytest.raises(ImageError, match="no image 'nothing'"):
        store.remove_images("nothing", in_use={})

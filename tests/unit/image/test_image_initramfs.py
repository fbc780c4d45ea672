"""The initramfs: cpio archives, module order, signatures."""

from __future__ import annotations

import lzma
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import pytest

from qvm.errors import ImageError
from qvm.image import cpio, initramfs, modules

DEPENDENCIES = """\
kernel/fs/ext4/ext4.ko.xz: kernel/lib/crc16.ko.xz kernel/fs/mbcache.ko.xz kernel/fs/jbd2/jbd2.ko.xz
kernel/fs/jbd2/jbd2.ko.xz:
kernel/fs/mbcache.ko.xz:
kernel/lib/crc16.ko.xz:
kernel/crypto/crc32c-generic.ko.xz:
kernel/net/core/failover.ko.xz:
kernel/drivers/net/net_failover.ko.xz: kernel/net/core/failover.ko.xz
kernel/drivers/net/virtio_net.ko.xz: kernel/drivers/net/net_failover.ko.xz kernel/net/core/failover.ko.xz
"""


def test_archive_starts_with_magic_and_is_padded() -> None:
    data = cpio.build_archive([cpio.folder("dev"), cpio.file("init", b"#!/bin/sh\n", 0o755)])
    assert data.startswith(b"070701")
    assert len(data) % 4 == 0
    assert data.count(b"070701") == 3
    assert data.rstrip(b"\0").endswith(b"TRAILER!!!")


def test_archive_is_the_same_every_time() -> None:
    entries = [cpio.folder("a"), cpio.link("a/b", "/c"), cpio.character_device("dev", 5, 1)]
    assert cpio.build_archive(entries) == cpio.build_archive(list(entries))


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs cpio: sudo apt install cpio")
def test_cpio_reads_it(tmp_path: Path) -> None:
    archive = cpio.build_archive([cpio.folder("a"), cpio.file("a/text", b"hello", 0o640), cpio.link("a/to", "text")])
    subprocess.run(["cpio", "-i", "--quiet"], input=archive, cwd=tmp_path, check=True)
    assert (tmp_path / "a/text").read_bytes() == b"hello"
    assert (tmp_path / "a/text").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "a/to").readlink() == Path("text")


def test_needs_come_first_and_once() -> None:
    table = modules.parse_dependencies(DEPENDENCIES)
    order = [modules.module_name(path) for path in modules.resolve(["ext4", "virtio_net", "jbd2"], table, frozenset())]
    assert order.index("jbd2") < order.index("ext4")
    assert order.index("failover") < order.index("net_failover") < order.index("virtio_net")
    assert len(order) == len(set(order)) == 7


def test_names_are_alike_with_dash_and_underscore() -> None:
    table = modules.parse_dependencies(DEPENDENCIES)
    for name in ("crc32c_generic", "crc32c-generic"):
        assert modules.resolve([name], table, frozenset()) == ["kernel/crypto/crc32c-generic.ko.xz"]


def test_built_in_modules_are_left_out() -> None:
    builtin = modules.parse_builtin("kernel/drivers/virtio/virtio_pci.ko\n")
    assert modules.resolve(["virtio_pci"], {}, builtin) == []


def test_unknown_module_is_an_error() -> None:
    with pytest.raises(ImageError, match="no module 'nothing'"):
        modules.resolve(["nothing"], {}, frozenset())


def test_signature_is_cut_off() -> None:
    module, signature = b"\x7fELF" + bytes(100), b"s" * 40
    info = bytes(8) + len(signature).to_bytes(4, "big")
    assert modules.strip_signature(module + signature + info + b"~Module signature appended~\n") == module
    assert modules.strip_signature(module) == module


def test_unknown_compression_is_an_error() -> None:
    with pytest.raises(ImageError, match="compression"):
        modules.decompress("kernel/a.ko.zst", b"")


def test_collect_reads_and_unpacks() -> None:
    files = {
        "modules.dep": b"kernel/a.ko.xz: kernel/b.ko\nkernel/b.ko:\n",
        "modules.builtin": b"",
        "kernel/a.ko.xz": lzma.compress(b"A"),
        "kernel/b.ko": b"B",
    }
    found = initramfs.collect_modules(["a"], PurePosixPath(), lambda path: files[str(path)])
    assert found == [("b", b"B"), ("a", b"A")]


def test_initramfs_holds_init_and_modules_in_order() -> None:
    data = initramfs.build_initramfs(b"#!init", b"busybox", [("b", b"B"), ("a", b"A")], [("c", b"C")])
    names = (b"dev/console\0", b"init\0", b"modules/00-b.ko\0", b"modules/01-a.ko\0", b"modules/later/00-c.ko\0")
    places = [data.index(name) for name in names]
    assert all(place > 0 for place in places)
    assert places[2] < places[3]

"""Overlays that we write ourselves, judged by qemu-img."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from qvm.image.qcow2 import write_overlay

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is missing: qemu-utils")

GiB = 1 << 30


@pytest.mark.parametrize("size", [GiB, 20 * GiB, 512 * (1 << 20) * 8192 + 65536])
def test_qemu_img_takes_it_for_its_own(tmp_path: Path, size: int) -> None:
    base, overlay = tmp_path / "base, one.raw", tmp_path / "o.qcow2"
    base.write_bytes(b"hello".ljust(1 << 20, b"\0"))
    write_overlay(overlay, backing=base, backing_format="raw", size=size)
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", overlay], check=True)
    info = json.loads(subprocess.run(["qemu-img", "info", "--output=json", overlay], check=True,
                                     capture_output=True).stdout)
    assert info["virtual-size"] == size
    assert info["full-backing-filename"] == str(base)
    assert info["backing-filename-format"] == "raw"
    assert info["format-specific"]["data"]["lazy-refcounts"] is True
    assert overlay.stat().st_mode & 0o777 == 0o600
    assert overlay.stat().st_blocks * 512 < 64 << 10


def test_what_is_written_stays_in_it(tmp_path: Path) -> None:
    base, overlay, flat = tmp_path / "base.raw", tmp_path / "o.qcow2", tmp_path / "flat.raw"
    base.write_bytes(b"A" * (4 << 20))
    write_overlay(overlay, backing=base, backing_format="raw", size=8 << 20)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 66 1M 64k", "-c", "write -P 67 7M 64k", overlay],
                   check=True, capture_output=True)
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", overlay], check=True)
    subprocess.run(["qemu-img", "convert", "-O", "raw", overlay, flat], check=True)
    data = flat.read_bytes()
    assert len(data) == 8 << 20
    assert data[1 << 20 : (1 << 20) + 65536] == b"B" * 65536
    assert data[7 << 20 : (7 << 20) + 65536] == b"C" * 65536
    assert data[: 1 << 20] == b"A" * (1 << 20)
    assert data[4 << 20 : 7 << 20] == bytes(3 << 20)
    assert base.read_bytes() == b"A" * (4 << 20)


def test_never_over_a_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "o").write_bytes(b"x")
    with pytest.raises(FileExistsError):
        write_overlay(tmp_path / "o", backing=tmp_path / "b", backing_format="raw", size=1 << 20)

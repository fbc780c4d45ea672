"""What is let in and what is refused, by hand-made headers: nothing here needs, or runs, another program."""

from __future__ import annotations

import builtins
import os
from pathlib import Path
from typing import Any

import pytest
from disk_parts import bootable, gpt, qcow2

from qvm.errors import ImageError
from qvm.image.headers import MAX_SIZE, read_header

DATA_FILE, ENCRYPTION, BACKING_FORMAT, BITMAPS = 0x44415441, 0x0537BE77, 0xE2792ACA, 0x23852875


def put(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "image"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("data", [
    qcow2(), qcow2(version=2), qcow2(features=1), qcow2(features=8), qcow2(features=16),
    qcow2(extensions=[(BITMAPS, bytes(24)), (0x6803F857, bytes(48))]), qcow2(extensions=[(BACKING_FORMAT, b"raw")]),
])  # fmt: skip
def test_a_qcow2_that_stands_alone(tmp_path: Path, data: bytes) -> None:
    header = read_header(put(tmp_path, data))
    assert (header.format, header.size) == ("qcow2", 16 << 20)


REFUSED_QCOW2 = {
    "backing file": (qcow2(backing=b"/etc/shadow"), "on top of another file .'/etc/shadow'"),
    "backing file of version 2": (qcow2(version=2, backing=b"base.qcow2"), "on top of another file"),
    "backing file elsewhere": (qcow2(backing=b'json:{"driver":"nbd"}'), "on top of another file"),
    "data file by its feature": (qcow2(features=4), "data is in another file"),
    "data file by its name": (qcow2(extensions=[(DATA_FILE, b"/etc/passwd")]), "in another file .'/etc/passwd'"),
    "data file behind others": (qcow2(extensions=[(BITMAPS, bytes(24)), (DATA_FILE, b"/dev/sda")]), "/dev/sda"),
    "data file of version 2": (qcow2(version=2, extensions=[(DATA_FILE, b"/etc/passwd")]), "data is in another file"),
    "unknown features": (qcow2(features=1 << 40), "features nobody knows"),
    "marked corrupt": (qcow2(features=2), "marked as corrupt"),
    "AES": (qcow2(crypt=1), "encrypted"),
    "LUKS": (qcow2(extensions=[(ENCRYPTION, bytes(16))]), "encrypted"),
    "tiny clusters": (qcow2(cluster_bits=3), "damaged"),
    "huge clusters": (qcow2(cluster_bits=60), "damaged"),
    "no size": (qcow2(size=0), "takes up to"),
    "absurd size": (qcow2(size=MAX_SIZE + 512), "takes up to"),
    "version 1": (qcow2(version=1), "version 1"),
    "tables behind the end": (qcow2(length=2 * 65536), "truncated"),
    "header cut short": (qcow2()[:40], "truncated"),
    "header of version 3 cut short": (qcow2()[:90], "truncated"),
    "extension without an end": (qcow2(extensions=[(BITMAPS, bytes(8))])[:104] + b"\x23\x85\x28\x75\xff\xff\xff\xf0"
                                 + bytes(4 * 65536), "no end"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_QCOW2)
def test_a_qcow2_that_is_refused(tmp_path: Path, case: str) -> None:
    data, reason = REFUSED_QCOW2[case]
    with pytest.raises(ImageError, match=reason):
        read_header(put(tmp_path, data))


VMDK_TEXT = b"""# Disk DescriptorFile
version=1
CID=fffffffe
parentCID=ffffffff
createType="monolithicFlat"
RW 2048 FLAT "/etc/shadow" 0
"""
_DISK = bootable("BOOTX64.EFI")
REFUSED = {
    "VMDK, sparse": (b"KDMV" + bytes(2048), "VMDK"),
    "VMDK, old": (b"COWD" + bytes(2048), "VMDK"),
    "VMDK, descriptor": (VMDK_TEXT, "VMDK"),
    "VMDK, descriptor behind a comment": (b"# hello\n" + VMDK_TEXT.partition(b"\n")[2], "VMDK"),
    "VHD, dynamic": (b"conectix" + bytes(1024), "VHD"),
    "VHD, fixed": (_DISK + b"conectix".ljust(512, b"\0"), "VHD"),
    "VHDX": (b"vhdxfile" + bytes(65536), "VHDX"),
    "VDI": (b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe" + bytes(512),
            "VDI|web page"),
    "VDI with another text": (bytes(64) + b"\x7f\x10\xda\xbe" + bytes(512), "VDI"),
    "QED": (b"QED\0" + bytes(1024), "QED"),
    "COW": (b"OOOM" + bytes(1024), "COW"),
    "Parallels": (b"WithoutFreeSpace" + bytes(1024), "Parallels"),
    "dmg": (_DISK + b"koly".ljust(512, b"\0"), "Apple"),
    "LUKS": (b"LUKS\xba\xbe" + bytes(1024), "LUKS"),
    "ISO": (bytes(32769) + b"CD001" + bytes(4096), "ISO 9660"),
    "hybrid ISO": (bytes(510) + b"\x55\xaa" + bytes(32769 - 512) + b"CD001" + bytes(4096), "ISO 9660"),
    "OVA": (b"box.ovf".ljust(257, b"\0") + b"ustar" + bytes(1024), "tar archive"),
    "ZIP": (b"PK\x03\x04" + bytes(1024), "ZIP"),
    "bzip2": (b"BZh9" + bytes(1024), "bzip2"),
    "web page": (b"\n <!DOCTYPE html><html>not found</html>", "web page"),
    "JSON": (b'{"driver": "file", "filename": "/etc/shadow"}', "JSON"),
    "text": (b"nothing but words\n" * 100, "no partition table"),
    "zeros": (bytes(1 << 20), "no partition table"),
    "empty": (b"", "empty"),
    "half a sector": (_DISK[:-100], "whole number of sectors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_anything_else_is_refused_by_name(tmp_path: Path, case: str) -> None:
    data, reason = REFUSED[case]
    with pytest.raises(ImageError, match=reason):
        read_header(put(tmp_path, data))


def test_a_raw_disk(tmp_path: Path) -> None:
    header = read_header(put(tmp_path, bytes(gpt([]))))
    assert (header.format, header.size) == ("raw", 16 << 20)


@pytest.mark.parametrize(("data", "name"), [
    (b"\x1f\x8b\x08\0", "gz"), (b"\xfd7zXZ\0\0", "xz"), (b"\x28\xb5\x2f\xfd\0", "zst"),
])  # fmt: skip
def test_compressed_once_but_not_twice(tmp_path: Path, data: bytes, name: str) -> None:
    path = put(tmp_path, data)
    assert read_header(path).format == name
    with pytest.raises(ImageError, match="twice"):
        read_header(path, unpacked=True)


def test_nothing_but_the_file_itself_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the host that images name exist and could be read."""
    secret = tmp_path / "secret"
    secret.write_text("secret")
    name = os.fsencode(secret)
    opened: list[str] = []

    def note(path: Any, *rest: Any, **options: Any) -> Any:
        opened.append(str(path))
        return real(path, *rest, **options)

    real = builtins.open
    real_os = os.open
    monkeypatch.setattr(builtins, "open", note)
    monkeypatch.setattr("io.open", note)
    monkeypatch.setattr(os, "open", lambda path, *rest, **options: (opened.append(str(path)),
                                                                    real_os(path, *rest, **options))[1])
    for data in (qcow2(backing=name), qcow2(extensions=[(DATA_FILE, name)]),
                 VMDK_TEXT.replace(b"/etc/shadow", name)):  # fmt: skip
        image = tmp_path / "image"
        with image.open("wb") as file:
            file.write(data)
        opened.clear()
        with pytest.raises(ImageError):
            read_header(image)
        assert set(opened) == {str(image)}

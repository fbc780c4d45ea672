"""What a disk image from elsewhere is, told by its own first bytes, before any other program opens it.

qemu-img, asked to guess, follows what a file says of itself: a qcow2 names backing and data files, a VMDK its extents,
a VHD its parent, and whoever sent the image reads files of this host through it (CVE-2024-32498, CVE-2015-5163). So
qvm reads the headers itself, accepts two formats, and gives qemu-img the format in words. Everything else is
refused by name. Formats: QEMU's docs/interop/qcow2.txt and the probe functions in QEMU's block/*.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from qvm.errors import ImageError
from qvm.units import GiB, format_size

RAW, QCOW2 = "raw", "qcow2"
COMPRESSIONS = {b"\x1f\x8b": "gz", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zst"}
MAX_SIZE = 2048 * GiB
"""Of a disk, in bytes. Nobody ships a larger one; a header that says so is a mistake or an attack."""

_HEAD = 64 * 1024
_FLATTEN = "qemu-img convert -O qcow2 IMAGE FLAT.qcow2, where it was made, makes one that stands alone"

# Magic at a fixed place -> what it is. All of these either refer to other files or are no disk at all.
_REFUSED: tuple[tuple[int, bytes, str], ...] = (
    (0, b"KDMV", "a VMDK, whose parts may be any file of this host"),
    (0, b"COWD", "a VMDK of the old kind, whose parts may be any file of this host"),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor, which names other files as its parts"),
    (0, b"vhdxfile", "a VHDX, which may name a parent"),
    (0, b"conectix", "a VHD, which may name a parent"),
    (0, b"QED\x00", "a QED image, which may name a backing file"),
    (0, b"OOOM", "a User-mode Linux COW image, which names a backing file"),
    (0, b"WithoutFreeSpace", "a Parallels image"),
    (0, b"WithouFreSpacExt", "a Parallels image"),
    (0, b"Bochs Virtual HD Image", "a Bochs image"),
    (0, b"LUKS\xba\xbe", "an encrypted (LUKS) volume"),
    (0, b"-----BEGIN", "a key or certificate"),
    (0, b"BZh", "compressed with bzip2"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"\x04\x22\x4d\x18", "compressed with lz4"),
    (0, b"hsqs", "a squashfs file system"),
    (0, b"\x7fELF", "a program"),
    (0, b"<", "a web page or XML document"),
    (0, b"{", "a JSON document"),
    (0x40, b"\x7f\x10\xda\xbe", "a VDI (VirtualBox), which may name a parent"),
    (257, b"ustar", "a tar archive (an OVA, perhaps)"),
    (32769, b"CD001", "an ISO 9660 image: an installer, perhaps, not an installed disk"),
)
_CONVERT = "convert it where it was made: qemu-img convert -O qcow2 IMAGE DISK.qcow2"


@dataclass(frozen=True, slots=True)
class Header:
    format: str
    """"raw", "qcow2", or, for what has to be unpacked first, "gz", "xz" or "zst"."""
    size: int
    """Bytes of the disk; of the file itself where it is compressed."""


def read_header(path: Path, *, unpacked: bool = False) -> Header:
    """What the file is; ImageError with the reason where qvm does not take it. `unpacked`: it came out of another
    file, so it must not be a compressed one again."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEAD)
            file.seek(max(0, size - 512))
            tail = file.read(512)
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}") from error
    if not head:
        raise ImageError(f"{path} is empty")
    for magic, name in COMPRESSIONS.items():
        if head.startswith(magic):
            if unpacked:
                raise ImageError("the image is compressed twice", hint="unpack it once, then import the result")
            return Header(name, size)
    if head.startswith(b"QFI\xfb"):
        return Header(QCOW2, check_qcow2(head, size))
    refuse_known(head, tail)
    return Header(RAW, check_raw(head, size))


def refuse_known(head: bytes, tail: bytes) -> None:
    """ImageError where the bytes are of a format that qvm does not take. `tail`: the last 512 bytes."""
    # Raw disks begin with boot code, or with zeros: none of these words.
    lead = head.lstrip(b" \t\r\n")
    for at, magic, what in _REFUSED:
        if head.startswith(magic, at) or (at == 0 and magic in (b"<", b"{") and lead.startswith(magic)):
            raise ImageError(f"it is {what}, and is refused", hint=_CONVERT)
    # A descriptor may begin with other comment lines; a fixed VHD is a raw disk with a footer behind it.
    if b"createType=" in head[:4096] and b"parentCID" in head[:4096]:
        raise ImageError("it is a VMDK descriptor, which names other files as its parts, and is refused", hint=_CONVERT)
    if tail.startswith(b"conectix"):
        raise ImageError("it is a VHD, which may name a parent, and is refused", hint=_CONVERT)
    if tail.startswith(b"koly"):
        raise ImageError("it is an Apple disk image (dmg), and is refused", hint=_CONVERT)


# qcow2 -------------------------------------------------------------------------------------------------------------

_QCOW2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = 1, 2, 4, 8, 16
_KNOWN = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION | _EXTENDED_L2
_EXT_END, _EXT_DATA_FILE, _EXT_ENCRYPTION = 0, 0x44415441, 0x0537BE77


def check_qcow2(head: bytes, file_size: int) -> int:
    """The virtual size in bytes of the qcow2 that begins with `head`; ImageError where it refers to other files, is
    encrypted, needs features nobody knows, or cannot be whole."""
    if len(head) < _QCOW2.size:
        raise ImageError("it is a truncated qcow2: the header is cut short")
    (_, version, backing_at, backing_length, cluster_bits, size, crypt, l1_entries, l1_at, refcounts_at, _, _,
     _) = _QCOW2.unpack_from(head)  # fmt: skip
    if version not in (2, 3):
        raise ImageError(f"it is a qcow image of version {version}; qvm takes 2 and 3", hint=_CONVERT)
    header_length = 72
    features = 0
    if version == 3:
        if len(head) < 104:
            raise ImageError("it is a truncated qcow2: the header is cut short")
        features, _, _, _, header_length = _V3.unpack_from(head, 72)
    if backing_at or backing_length:
        name = head[backing_at : backing_at + min(backing_length, 1023)].decode(errors="replace")
        raise ImageError(f"it is a qcow2 on top of another file ({name!r}) and is refused", hint=_FLATTEN)
    if features & _DATA_FILE:
        raise ImageError("it is a qcow2 whose data is in another file, and is refused", hint=_FLATTEN)
    if features & ~_KNOWN:
        raise ImageError(f"it is a qcow2 with features nobody knows ({features & ~_KNOWN:#x})", hint=_FLATTEN)
    if features & _CORRUPT:
        raise ImageError("it is a qcow2 that is marked as corrupt", hint="qemu-img check -r all, where it was made")
    if crypt:
        raise ImageError("it is an encrypted qcow2", hint=_FLATTEN)
    if not 9 <= cluster_bits <= 21:
        raise ImageError(f"it is a damaged qcow2: clusters of 2^{cluster_bits} bytes")
    _check_extensions(head, header_length, 1 << cluster_bits)
    if l1_at + l1_entries * 8 > file_size or refcounts_at >= file_size:
        raise ImageError("it is a truncated qcow2: its tables lie behind the end of the file")
    return _check_size(size)


def _check_extensions(head: bytes, at: int, cluster: int) -> None:
    end = min(cluster, len(head))
    while at + 8 <= end:
        kind, length = struct.unpack_from(">II", head, at)
        if kind == _EXT_END:
            return
        if kind == _EXT_DATA_FILE:
            name = head[at + 8 : at + 8 + min(length, 1023)].decode(errors="replace")
            raise ImageError(f"it is a qcow2 whose data is in another file ({name!r}), and is refused", hint=_FLATTEN)
        if kind == _EXT_ENCRYPTION:
            raise ImageError("it is an encrypted qcow2", hint=_FLATTEN)
        if at + 8 + length > end:
            raise ImageError("it is a damaged qcow2: a header extension has no end")
        at += 8 + -(-length // 8) * 8


def _check_size(size: int) -> int:
    if not 0 < size <= MAX_SIZE:
        raise ImageError(f"it says it is a disk of {format_size(size)}; qvm takes up to {format_size(MAX_SIZE)}")
    return size


# raw ---------------------------------------------------------------------------------------------------------------


def check_raw(head: bytes, size: int) -> int:
    """The size of a raw disk in bytes; ImageError where the bytes are no partitioned disk."""
    if head[510:512] != b"\x55\xaa":
        raise ImageError("it is no disk image that qvm knows: it has no partition table",
                         hint="qvm takes qcow2 and raw disks, also as .gz, .xz and .zst")
    if size % 512:
        raise ImageError(f"it is a truncated disk: {size} bytes are no whole number of sectors")
    return _check_size(size)

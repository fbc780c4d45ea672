"""Disk images through qemu-img, always with explicit formats: a guest that writes its own header must fool nobody."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from qvm import process
from qvm.errors import HostError, ImageError, NoSpaceError
from qvm.process import CommandError
from qvm.units import format_size


@dataclass(frozen=True, slots=True)
class DiskInfo:
    """Sizes in bytes."""

    format: str
    virtual_size: int
    actual_size: int
    """What it takes on the host's disk."""
    backing: Path | None
    backing_format: str | None
    data_file: str | None
    """An external data file; no image from elsewhere may name one."""


def qemu_img(*words: str | Path) -> bytes:
    """Run qemu-img and return its output; ImageError (or HostError, NoSpaceError) with its words where it fails."""
    program = process.find_program("qemu-img")
    if program is None:
        raise HostError("the program 'qemu-img' is not installed", hint="sudo apt install qemu-utils")
    try:
        return process.run([program, *words]).stdout
    except CommandError as error:
        details = error.details or ""
        if "No space left" in details:
            raise NoSpaceError("the host's disk is full", details=details, hint="free some space") from error
        if 'Failed to get "write" lock' in details or 'Failed to get shared "write" lock' in details:
            raise ImageError(f"{words[-1]} is in use by a running VM", details=details) from error
        raise ImageError(f"qemu-img {words[0]} failed", details=details or None) from error


def disk_info(path: Path, *, format: str = "qcow2") -> DiskInfo:
    """What a disk image says of itself, read as `format`. Safe while a VM uses it. ImageError where it is none."""
    # Resolved: names of backing files are relative to where an image is, not to a link to it.
    data = json.loads(qemu_img("info", "-U", "-f", format, "--output=json", path.resolve()))
    specific = data.get("format-specific", {}).get("data", {})
    backing = data.get("full-backing-filename") or data.get("backing-filename")
    return DiskInfo(
        format=str(data["format"]), virtual_size=int(data["virtual-size"]), actual_size=int(data["actual-size"]),
        backing=Path(backing) if backing else None, backing_format=data.get("backing-filename-format"),
        data_file=specific.get("data-file"),
    )  # fmt: skip


def create_overlay(path: Path, *, backing: Path, backing_format: str, size: int) -> None:
    """A qcow2 at `path` (0600) of `size` bytes over a read-only image; ImageError where that would cut the image."""
    base = disk_info(backing, format=backing_format)
    if size < base.virtual_size:
        raise ImageError(
            f"a root disk of {format_size(size)} is smaller than its image ({format_size(base.virtual_size)})",
            hint=f"--root-disk {-(-base.virtual_size // 1024**3)}, or leave it out",
        )  # fmt: skip
    _create(path, "-b", backing, "-F", backing_format, size=size)


def create_disk(path: Path, size: int) -> None:
    """An empty qcow2 (0600) of `size` bytes; it takes what is written to it."""
    _create(path, size=size)


# The file is new, so all of it reads as zeros; saying so keeps the guest from zeroing inode tables in the background.
# meta_bg keeps the file system growable without limit, and its descriptors where they are used.
_EXT4 = ("-q", "-F", "-t", "ext4", "-L", "qvm-data", "-m", "0", "-E", "assume_storage_prezeroed=1,nodiscard",
         "-O", "^resize_inode,meta_bg")  # fmt: skip


def create_data_disk(path: Path, size: int) -> None:
    """A qcow2 (0600) of `size` bytes that holds an empty ext4, where this host has mke2fs; else an empty one.

    Either way the guest ends with the same: it formats a blank disk itself, which takes seconds under emulation.
    """
    program = process.find_program("mke2fs")
    raw = path.with_name(path.name + ".raw")
    partial = path.with_name(path.name + ".partial")
    try:
        if program is not None:
            with raw.open("wb") as file:
                file.truncate(size)
            if process.run([program, *_EXT4, raw], check=False).returncode == 0:
                qemu_img("convert", "-f", "raw", "-O", "qcow2", "-o", _OPTIONS, raw, partial)
                partial.chmod(0o600)
                partial.rename(path)
                return
    except OSError as error:
        raise HostError(f"cannot make {path}: {error.strerror}",
                        hint="check that its folder can be written to") from error
    finally:
        raw.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    create_disk(path, size)


_OPTIONS = "lazy_refcounts=on"


def _create(path: Path, *words: str | Path, size: int) -> None:
    """Whole or not at all: what an interrupted call leaves is not at `path`."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        qemu_img("create", "-q", "-f", "qcow2", "-o", _OPTIONS, *words, partial, str(size))
        partial.chmod(0o600)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def resize_disk(path: Path, size: int) -> None:
    """Grow a qcow2 to `size` bytes; the VM must be off. ImageError before anything changes where it would shrink."""
    current = disk_info(path).virtual_size
    if size < current:
        raise ImageError(f"{path.name} has {format_size(current)} and cannot shrink to {format_size(size)}",
                         hint="a disk can only grow; choose at least its present size")
    if size > current:
        qemu_img("resize", "-q", "-f", "qcow2", path.resolve(), str(size))

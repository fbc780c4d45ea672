"""The disks of one instance as layers: what a snapshot has seen is never written again, the newest layer is.

A disk is known by one path (`root.qcow2`). That is a plain qcow2 until the first snapshot; from then on it is a link to
the newest layer, `<folder>/<stem>-<number>.qcow2`, and the plain file has become layer 0:

    root.qcow2 -> layers/root-2.qcow2 -> root-1.qcow2 -> root-0.qcow2 -> /cache/images/.../disk.raw

Layers name each other without a folder, so hard links to all layers of a chain, in the folder of another instance, are
a copy of that disk which costs nothing. QEMU and qemu-img must be given the resolved path: they look for a
backing file beside the path they were told.

Whatever is interrupted, the link leads to a whole chain: files come first and are synced, the link is switched last.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qvm import paths
from qvm.errors import HostError, ImageError
from qvm.filenames import Files
from qvm.image.qcow2 import write_overlay

# qcow2's header (QEMU, docs/interop/qcow2.txt): magic, version, offset and length of the backing file's name,
# cluster bits, virtual size; big-endian.
_HEADER = struct.Struct(">4sIQIIQ")
_MAGIC = b"QFI\xfb"


@dataclass(frozen=True, slots=True)
class LayeredDisk:
    path: Path
    """What the instance calls its disk: a qcow2, or a link to one in `folder`."""
    folder: Path
    stem: str


@dataclass(frozen=True, slots=True)
class Header:
    size: int
    """Bytes the guest sees."""
    backing: str | None
    """As written in the file: a bare name for a layer beside it, else an absolute path."""


def root_disk(files: Files) -> LayeredDisk:
    return LayeredDisk(files.root_disk, files.root_layers, "root")


def data_disk(files: Files) -> LayeredDisk:
    return LayeredDisk(files.data_disk, files.data_layers, "data")


def read_header(path: Path) -> Header:
    """ImageError where `path` is no qcow2."""
    try:
        with path.open("rb") as file:
            data = file.read(_HEADER.size)
            if len(data) < _HEADER.size or data[:4] != _MAGIC:
                raise ImageError(f"{path} is not a qcow2 image")
            _, _, offset, length, _, size = _HEADER.unpack(data)
            file.seek(offset)
            name = file.read(length).decode(errors="surrogateescape") if offset else ""
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    return Header(size, name or None)


def newest(disk: LayeredDisk) -> Path:
    """The file the machine writes to: what QEMU is to be given."""
    return Path(os.path.realpath(disk.path))


def chain_of(layer: Path) -> list[Path]:
    """`layer` and the layers below it in the same folder, newest first; what lies in the cache is not a layer."""
    found = [layer]
    while (backing := read_header(found[-1]).backing) is not None and "/" not in backing:
        found.append(layer.parent / backing)
    return found


def layers_in(disk: LayeredDisk) -> list[Path]:
    """All layer files there are, oldest number first."""
    if not disk.folder.is_dir():
        return []
    named = [(number, path) for path in disk.folder.iterdir() if (number := _number(disk, path)) is not None]
    return [path for _, path in sorted(named)]


def _number(disk: LayeredDisk, path: Path) -> int | None:
    stem, _, number = path.name.removesuffix(".qcow2").rpartition("-")
    return int(number) if stem == disk.stem and path.suffix == ".qcow2" and number.isdigit() else None


def _layer(disk: LayeredDisk, number: int) -> Path:
    return disk.folder / f"{disk.stem}-{number}.qcow2"


def _next(disk: LayeredDisk) -> Path:
    return _layer(disk, max((_number(disk, path) or 0 for path in layers_in(disk)), default=0) + 1)


def frozen_name(disk: LayeredDisk) -> Path:
    """The newest layer under the name that it has among the layers; a plain file gets one (a hard link) here."""
    current = newest(disk)
    if disk.path.is_symlink():
        return current
    paths.ensure_private_dir(disk.folder)
    for path in layers_in(disk):
        if path.samefile(current):
            return path
    number = 0 if not layers_in(disk) else (_number(disk, layers_in(disk)[-1]) or 0) + 1
    try:
        os.link(current, _layer(disk, number))
    except OSError as error:
        raise HostError(f"{current} cannot get a second name: {error.strerror}",
                        hint="snapshots need a file system with hard links") from error
    return _layer(disk, number)


def add_layer(disk: LayeredDisk, below: Path) -> Path:
    """A new empty layer over the layer `below`, on disk for good, but not the disk's newest before `switch`."""
    layer = _next(disk)
    partial = layer.with_name(layer.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        write_overlay(partial, backing=Path(below.name), backing_format="qcow2", size=read_header(below).size)
        paths.sync(partial)
        partial.rename(layer)
    except OSError as error:
        raise HostError(f"cannot make {layer}: {error.strerror}", hint="free some space") from error
    finally:
        partial.unlink(missing_ok=True)
    paths.sync(disk.folder)
    return layer


def switch(disk: LayeredDisk, layer: Path) -> None:
    """From now on the disk is `layer`; atomic, and on disk for good when this returns."""
    link = disk.path.with_name(f".{disk.path.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(layer, disk.path.parent))
    link.replace(disk.path)
    paths.sync(disk.path.parent)


def put_back(disk: LayeredDisk, top: str) -> None:
    """Have the disk as the layer `top` remembers it; what was written since is left behind. The machine is off."""
    below = disk.folder / top
    if not below.exists():
        raise ImageError(f"the layer {below} is gone")
    switch(disk, add_layer(disk, below))


def link_chain(top: Path, into: LayeredDisk) -> None:
    """Make `into` a disk of another instance that begins with what `top` holds; nothing is copied."""
    paths.ensure_private_dir(into.folder)
    for layer in chain_of(top):
        name = into.folder / layer.name
        name.unlink(missing_ok=True)
        os.link(layer, name)
    switch(into, add_layer(into, into.folder / top.name))


def find_unused(disk: LayeredDisk, tops: Iterable[str]) -> list[Path]:
    """Layer files that neither the disk nor a saved state (its top layer is in `tops`) is made of."""
    used: set[Path] = set()
    for top in [newest(disk), *(disk.folder / name for name in tops)]:
        if top.exists():
            used.update(chain_of(top))
    return [path for path in layers_in(disk) if path not in used]


def remove_unused(disk: LayeredDisk, tops: Iterable[str]) -> list[Path]:
    unused = find_unused(disk, tops)
    for path in unused:
        path.unlink()
    _leave_plain(disk)
    return unused


def _leave_plain(disk: LayeredDisk) -> None:
    """An emptied folder of a plain disk goes."""
    if not disk.path.is_symlink() and disk.folder.is_dir() and not any(disk.folder.iterdir()):
        disk.folder.rmdir()

"""Finished images in the cache: immutable folders named by their content, and references from names to them.

    cache_home()/images/<first 16 digits of the id>/   disk.raw (or .qcow2) vmlinuz initrd manifest.json
    cache_home()/images/refs/<name>-<arch>.json        the image that is current for a recipe or catalogue entry
    cache_home()/images/base/                          see rootfs.py
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvm import paths
from qvm.arch import Arch, find_arch
from qvm.errors import ImageError, InstanceStateError

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Image:
    """An image ready for use. Everything in `folder` is read-only for ever."""

    id: str
    """SHA-256 over the digests of its files."""
    name: str
    arch: Arch
    folder: Path
    disk: Path
    format: str
    """Of the disk: "raw" or "qcow2". QEMU must never guess it."""
    kernel: Path | None
    initrd: Path | None
    """Both None for images that boot by firmware."""
    cmdline: str
    """Kernel command line without what depends on the machine (console) or the accelerator."""
    manifest: dict[str, Any]

    @property
    def is_foreign(self) -> bool:
        """qvm did not make it: it boots by firmware, and cloud-init brings the agent into it."""
        return self.kernel is None

    @property
    def is_imported(self) -> bool:
        """A user's own, which nothing here could make again."""
        return bool(self.manifest.get("imported"))

    def describe(self) -> dict[str, Any]:
        """For `image list` and --json."""
        return {
            "name": self.name, "arch": self.arch.name, "id": self.id, "state": "ready",
            "size": used_bytes(self.folder), "source": self.manifest.get("source", ""), "format": self.format,
            "created": self.manifest.get("created"), "folder": str(self.folder),
            "tools": self.manifest.get("tools", {}), "kernel": self.manifest.get("kernel_release"),
            "imported": self.is_imported, "digest": self.manifest.get("digest"),
        }  # fmt: skip


def images_dir() -> Path:
    return paths.cache_home() / "images"


def ref_path(name: str, arch: Arch) -> Path:
    """The reference from a name to its current image."""
    return images_dir() / "refs" / f"{name}-{arch.name}.json"


def folder_of(image_id: str) -> Path:
    return images_dir() / image_id[:16]


def used_bytes(folder: Path) -> int:
    """Bytes that the files of a folder take on disk (holes take none)."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def digest_file(path: Path) -> str:
    """SHA-256 of a file's content by chunks that are not all zero, each with its place.

    A disk of 20 GiB that holds one is digested in the time of one, and alike however its holes came to be.
    """
    total = hashlib.sha256(str(path.stat().st_size).encode())
    zeros = bytes(_CHUNK)
    with path.open("rb") as file:
        at, size = 0, path.stat().st_size
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // _CHUNK * _CHUNK
            except OSError:
                break  # ENXIO: nothing but a hole up to the end
            data = os.pread(file.fileno(), _CHUNK, at)
            if data != zeros[: len(data)]:
                total.update(at.to_bytes(8, "little") + hashlib.sha256(data).digest())
            at += _CHUNK
    return total.hexdigest()


def seal(folder: Path, manifest: dict[str, Any]) -> str:
    """Digest the files of a finished folder, write its manifest, sync all of it to disk and return the id."""
    digests = {path.name: digest_file(path) for path in sorted(folder.iterdir()) if path.is_file()}
    fixed = {key: manifest[key] for key in ("name", "arch", "format", "cmdline")}
    image_id = hashlib.sha256(json.dumps([digests, fixed], sort_keys=True).encode()).hexdigest()
    document = {"version": 1, "id": image_id, "created": int(time.time()), "digests": digests, **manifest}
    (folder / MANIFEST).write_text(json.dumps(document, indent=1) + "\n")
    for path in folder.iterdir():
        path.chmod(0o444)
        paths.sync(path)
    paths.sync(folder)
    return image_id


def publish(folder: Path, image_id: str, *, key: str) -> Image:
    """Move a sealed folder to its place and make it the current one of its name; the caller holds the lock."""
    final = folder_of(image_id)
    if final.exists():
        shutil.rmtree(folder)  # the very same content was made before
    else:
        folder.rename(final)
        paths.sync(final.parent)
    image = load_image(image_id)
    set_current(image, key)
    return image


def set_current(image: Image, key: str) -> None:
    ref = ref_path(image.name, image.arch)
    paths.ensure_private_dir(ref.parent)
    partial = ref.with_suffix(".partial")
    partial.write_text(json.dumps({"key": key, "id": image.id}) + "\n")
    partial.rename(ref)


def load_image(image_id: str) -> Image:
    """The image with that id; ImageError where the cache has it no more or its folder is damaged."""
    image = find_image_by_id(image_id)
    if image is None:
        raise ImageError(f"the image {image_id[:12]} is not in the cache", hint="qvm image list")
    return image


def find_image_by_id(image_id: str) -> Image | None:
    """The image with that id (or a first part of it, 8 digits or more), else None."""
    if len(image_id) < 8 or not all(digit in "0123456789abcdef" for digit in image_id):
        return None
    for folder in images_dir().glob(f"{image_id[:16]}*"):
        image = _read(folder)
        if image is not None and image.id.startswith(image_id):
            return image
    return None


def _read(folder: Path) -> Image | None:
    """The image in a folder; None where it is no complete image of this version of qvm."""
    try:
        data = json.loads((folder / MANIFEST).read_text())
        arch = find_arch(data["arch"])
        names = data["files"]
        kernel, initrd = (folder / names[key] if names.get(key) else None for key in ("kernel", "initrd"))
        if arch is None or any(file is not None and not file.is_file() for file in (folder / names["disk"], kernel)):
            return None
        return Image(
            id=data["id"], name=data["name"], arch=arch, folder=folder, disk=folder / names["disk"],
            format=data["format"], kernel=kernel, initrd=initrd, cmdline=data["cmdline"], manifest=data,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_current(name: str, arch: Arch, key: str) -> Image | None:
    """The image that `name` refers to, when it was made for `key`; else None."""
    try:
        ref = json.loads(ref_path(name, arch).read_text())
        return find_image_by_id(ref["id"]) if ref["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_named(name: str, arch: Arch) -> Image | None:
    """The image that `name` refers to, whatever it was made for; else None."""
    try:
        return find_image_by_id(json.loads(ref_path(name, arch).read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def list_images() -> list[Image]:
    """Every complete image in the cache, newest first."""
    found = [image for folder in images_dir().glob("*") if (image := _read(folder)) is not None]
    return sorted(found, key=lambda image: -int(image.manifest.get("created", 0)))


def find_proof_files(image: Image) -> tuple[Path | None, Path | None]:
    """Kernel and initrd that an accelerator is proven with: the image's own, or, where it has none beside its disk,
    those of an image that qvm built for the same architecture. (None, None) where there is none."""
    if not image.is_foreign:
        return image.kernel, image.initrd
    built = next((each for each in list_images() if each.arch == image.arch and not each.is_foreign), image)
    return built.kernel, built.initrd


def remove_images(name: str, *, in_use: Mapping[str, str]) -> list[dict[str, Any]]:
    """Remove every image called `name`, or the one whose id begins so; what each was is returned.

    `in_use`: image id -> a profile made from it. Raises InstanceStateError before anything is removed where one of
    them is in use, ImageError where there is none.
    """
    images = [image for image in list_images() if image.name == name]
    if not images and (found := find_image_by_id(name)) is not None:
        images = [found]
    if not images:
        raise ImageError(f"there is no image {name!r} in the cache", hint="qvm image list")
    for image in images:
        if image.id in in_use:
            profile = in_use[image.id]
            raise InstanceStateError(f"the image {image.id[:12]} is the ground of {profile!r}",
                                     hint=f"qvm delete {profile} -f, then try again")
    return [remove_image(image.id) for image in images]


def remove_image(image_id: str, *, in_use: set[str] | frozenset[str] = frozenset()) -> dict[str, Any]:
    """Remove one image; InstanceStateError where `in_use` holds it."""
    image = load_image(image_id)
    if image.id in in_use:
        raise InstanceStateError(f"the image {image.id[:12]} is in use", hint="delete the instances made from it first")
    row = image.describe() | {"state": "removed"}
    # The manifest goes first: without it the folder is no image any more, whatever interrupts the rest.
    (image.folder / MANIFEST).unlink()
    shutil.rmtree(image.folder)
    if find_named(image.name, image.arch) is None:
        ref_path(image.name, image.arch).unlink(missing_ok=True)
    return row

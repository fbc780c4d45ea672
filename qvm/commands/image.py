"""`qvm image list|pull|build|rm`."""

from __future__ import annotations

from typing import Any

from qvm.arch import Arch, find_arch, host_arch
from qvm.errors import InstanceStateError, UsageError
from qvm.instance.store import find_record, list_profiles
from qvm.progress import Progress


def list_images() -> list[dict[str, Any]]:
    """The catalogue and what is in the cache, one row each."""
    from qvm.image.ensure import describe_images

    return describe_images()


def build(name: str, arch: str | None, *, force: bool = False, progress: Progress) -> dict[str, Any]:
    from qvm.image.ensure import build_image

    return build_image(name, _arch(arch), force=force, progress=progress).describe()


def pull(name: str, arch: str | None, *, progress: Progress) -> dict[str, Any]:
    """Have the image in the cache, by download or build."""
    from qvm.image.ensure import ensure_image

    return ensure_image(name, _arch(arch), progress=progress).describe()


def remove(name: str, *, progress: Progress) -> list[dict[str, Any]]:
    """Remove images by name or id; InstanceStateError for one that an instance was made from."""
    from qvm.image.store import remove_images

    return remove_images(name, in_use=images_in_use())


def images_in_use() -> dict[str, str]:
    """Image id -> a profile made from it."""
    used: dict[str, str] = {}
    for profile in list_profiles():
        try:
            record = find_record(profile)
        except InstanceStateError:
            continue  # a damaged record names no image; `list` shows it, and its disks keep their own backing path
        if record is not None:
            used[record.image_id] = profile
    return used


def _arch(name: str | None) -> Arch:
    if name is None:
        return host_arch()
    arch = find_arch(name)
    if arch is None:
        raise UsageError(f"unknown architecture {name!r}", hint="known: x86_64, aarch64")
    return arch

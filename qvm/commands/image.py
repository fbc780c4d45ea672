"""`qvm image list|pull|build|import|rm|prune`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qvm.arch import Arch, find_arch, host_arch
from qvm.errors import InstanceStateError, UsageError
from qvm.instance.store import find_record, list_profiles
from qvm.progress import Progress

IMAGE_NAME = re.compile(r"[a-z0-9][a-z0-9._+-]*")


def list_images() -> list[dict[str, Any]]:
    """The catalogue and what is in the cache, one row each."""
    from qvm.image.ensure import describe_images

    return describe_images()


def build(name: str, arch: str | None, *, force: bool = False, progress: Progress) -> dict[str, Any]:
    from qvm.commands.builder import build_in_vm
    from qvm.image.ensure import build_image

    return build_image(name, _arch(arch), force=force, builder=build_in_vm, progress=progress).describe()


def pull(name: str, arch: str | None, *, progress: Progress) -> dict[str, Any]:
    """Have the image in the cache, by download or build."""
    from qvm.commands.builder import build_in_vm
    from qvm.image.ensure import ensure_image

    return ensure_image(name, _arch(arch), builder=build_in_vm, progress=progress).describe()


def import_image(
    path: Path, name: str | None, arch: str | None, *, digest: str | None = None, force: bool = False,
    progress: Progress,
) -> dict[str, Any]:
    """Keep a disk image of the user's as `name` (else the file's name without its endings)."""
    from qvm.image import ensure, foreign

    chosen = name or foreign.plain_name(path.name)
    if not IMAGE_NAME.fullmatch(chosen):
        raise UsageError(f"{chosen!r} cannot be the name of an image",
                         hint="--name with lower-case letters, digits, '.', '_', '+' and '-'")
    wanted = None if arch is None else _arch(arch)
    return ensure.import_image(path, chosen, wanted, digest=digest, force=force, progress=progress).describe()


def remove(name: str, *, progress: Progress) -> list[dict[str, Any]]:
    """Remove images by name or id; InstanceStateError for one that an instance was made from."""
    from qvm.image.store import remove_images

    removed = remove_images(name, in_use=images_in_use())
    _forget_warm(removed)
    return removed


def prune(*, progress: Progress) -> list[dict[str, Any]]:
    """Remove what nothing needs any more: see `qvm.image.ensure.prune_images`."""
    from qvm.image.ensure import prune_images

    removed = prune_images(in_use=images_in_use())
    _forget_warm(removed)
    return removed


def _forget_warm(removed: list[dict[str, Any]]) -> None:
    """Warm images lie on the disks that are gone."""
    from qvm.warm.store import discard_warm, list_warm

    gone = {row["id"] for row in removed}
    for warm in list_warm():
        if warm.manifest["image"] in gone:
            discard_warm(warm)


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

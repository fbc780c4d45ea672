"""Having an image: from the cache, else by its recipe, else by download."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from qvm import locks, paths
from qvm.arch import Arch
from qvm.errors import ImageError, UsageError
from qvm.image import rootfs, store
from qvm.image.build import build_recipe
from qvm.image.catalogue import Entry, find_entry, load_catalogue
from qvm.image.disk import check_foreign_image
from qvm.image.download import download
from qvm.image.recipe import base_key, find_recipe, image_key
from qvm.image.store import Image
from qvm.progress import Progress


def _entry(name: str, arch: Arch) -> Entry:
    entry = find_entry(name, arch)
    if entry is not None:
        return entry
    names = sorted({each.name for each in load_catalogue()})
    if name in names:
        arches = ", ".join(each.arch.name for each in load_catalogue() if each.name == name)
        raise ImageError(f"there is no image {name!r} for {arch.name}", hint=f"it exists for {arches}")
    near = get_close_matches(name, names, 1)
    raise UsageError(f"unknown image {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                     hint="known: " + ", ".join(names))


def current_key(entry: Entry) -> str:
    """What the present image of that entry is made from."""
    if entry.digest is not None:
        return entry.digest
    recipe = find_recipe(entry.name)
    assert recipe is not None
    return image_key(recipe, entry.arch)


def find_image(name: str, arch: Arch) -> Image | None:
    """The image in the cache that fits the present recipe, agent and tools; else None."""
    entry = find_entry(name, arch)
    return None if entry is None else store.find_current(name, arch, current_key(entry))


def ensure_image(name: str, arch: Arch, *, progress: Progress) -> Image:
    """The image called `name`, made or fetched when the cache has no current one.

    Raises UsageError for an unknown name, HostError for what this host lacks, ImageError for what went wrong outside.
    """
    entry = _entry(name, arch)
    return store.find_current(name, arch, current_key(entry)) or _make(entry, progress=progress, force=False)


def build_image(name: str, arch: Arch, *, progress: Progress, force: bool = False) -> Image:
    """Like `ensure_image`; with `force` anew even where the cache has it, with the packages of today."""
    entry = _entry(name, arch)
    current = store.find_current(name, arch, current_key(entry))
    return current if current is not None and not force else _make(entry, progress=progress, force=force)


def _make(entry: Entry, *, progress: Progress, force: bool) -> Image:
    lock = paths.cache_home() / "images" / f"{entry.name}-{entry.arch.name}.lock"
    with locks.lock(lock, what=f"the image {entry.name}", on_wait=progress.note):
        current = store.find_current(entry.name, entry.arch, current_key(entry))
        if current is not None and not force:
            return current  # made by whoever held the lock before
        if entry.url is not None:
            return _fetch(entry, progress)
        recipe = find_recipe(entry.name)
        assert recipe is not None
        return build_recipe(recipe, entry.arch, progress=progress, force=force)


def _fetch(entry: Entry, progress: Progress) -> Image:
    assert entry.url is not None and entry.digest is not None
    work = paths.ensure_private_dir(store.images_dir()) / f".fetching-{entry.name}-{entry.arch.name}"
    paths.ensure_private_dir(work)
    name = f"disk.{entry.format}"
    # The part that arrived stays in this folder when the transfer breaks off, and is continued by the next try.
    disk = download(entry.url, entry.digest, work / f"{entry.name}-{entry.arch.name}.{entry.format}", progress=progress)
    try:
        check_foreign_image(disk, format=entry.format)
    except ImageError:
        disk.unlink()
        raise
    folder = work / "image"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700)
    disk.rename(folder / name)
    manifest = {
        "name": entry.name, "arch": entry.arch.name, "format": entry.format, "cmdline": "",
        "files": {"disk": name}, "source": entry.url, "digest": entry.digest,
    }  # fmt: skip
    with progress.step(f"sealing {entry.name}"):
        image = store.publish(folder, store.seal(folder, manifest), key=entry.digest)
    shutil.rmtree(work)
    return image


def prune_images(*, in_use: Mapping[str, str]) -> list[dict[str, Any]]:
    """Remove images that are current for nothing and that no instance was made from, and bases no recipe has.

    `in_use`: image id -> a profile made from it. Returns what each removed image was.
    """
    entries = load_catalogue()
    kept = {image.id for entry in entries
            if (image := store.find_current(entry.name, entry.arch, current_key(entry))) is not None}
    recipes = [(recipe, entry.arch) for entry in entries if (recipe := find_recipe(entry.name)) is not None]
    bases = {base_key(recipe, arch)[:16] for recipe, arch in recipes}
    for folder in rootfs.bases_dir().glob("*"):
        if folder.name not in bases and ".building" not in folder.name:
            rootfs.discard_base(folder)
    return [store.remove_image(image.id) for image in store.list_images()
            if image.id not in kept and image.id not in in_use]


def describe_images() -> list[dict[str, Any]]:
    """Every name of the catalogue with what the cache has of it, then images that are current for nothing any more.

    `state`: "ready", "outdated" (made by an older recipe or agent), "absent".
    """
    images = store.list_images()
    shown: set[str] = set()
    rows = []
    for entry in load_catalogue():
        current = store.find_current(entry.name, entry.arch, current_key(entry))
        if current is None:
            rows.append({"name": entry.name, "arch": entry.arch.name, "state": "absent", "id": None, "size": 0,
                         "title": entry.title, "source": entry.url or "recipe"})
        else:
            shown.add(current.id)
            rows.append(current.describe() | {"title": entry.title})
    rows += [image.describe() | {"state": "outdated"} for image in images if image.id not in shown]
    return rows

"""Having an image: from the cache, else by its recipe, by download, or from a file of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from qvm import locks, paths
from qvm.arch import Arch
from qvm.errors import ImageError, UsageError
from qvm.image import foreign, rootfs, store
from qvm.image.build import build_recipe
from qvm.image.builder import Builder
from qvm.image.catalogue import Entry, find_entry, load_catalogue
from qvm.image.recipe import base_key, find_recipe, image_key
from qvm.image.store import Image
from qvm.progress import Progress


def _entry(name: str, arch: Arch) -> Entry:
    entry = find_entry(name, arch)
    if entry is not None:
        return entry
    pairs = [(each.name, each.arch.name) for each in load_catalogue()]
    pairs += [(image.name, image.arch.name) for image in store.list_images() if image.is_imported]
    names = sorted({each for each, _ in pairs})
    if name in names:
        arches = ", ".join(word for each, word in pairs if each == name)
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
    """The image in the cache that fits the present recipe, agent and tools (or file); else None."""
    place = foreign.parse_place(name)
    if place is not None:
        return foreign.find_place(place, arch)
    entry = find_entry(name, arch)
    return foreign.find_imported(name, arch) if entry is None else store.find_current(name, arch, current_key(entry))


def deciding_files(name: str, arch: Arch) -> list[Path]:
    """Files on which it depends which image `name` is now."""
    place = foreign.parse_place(name)
    if place is None:
        return [store.ref_path(name, arch)]
    return [store.ref_path(place.name, arch), *([place.path] if place.path is not None else [])]


def ensure_image(name: str, arch: Arch, *, builder: Builder | None = None, progress: Progress) -> Image:
    """The image called `name` (or with that id, path or address), made or fetched when the cache has no current one.

    `builder`: who builds where this host lacks the programs.

    Raises UsageError for an unknown name, HostError for what this host lacks, ImageError for what went wrong outside.
    """
    place = foreign.parse_place(name)
    if place is not None:
        return foreign.ensure_place(place, arch, progress=progress)
    imported = None if find_entry(name, arch) is not None else foreign.find_imported(name, arch)
    if imported is not None:
        return imported
    if find_entry(name, arch) is None and (found := store.find_image_by_id(name)) is not None and found.arch == arch:
        return found
    entry = _entry(name, arch)
    current = store.find_current(name, arch, current_key(entry))
    return current or _make(entry, builder=builder, progress=progress, force=False)


def import_image(
    path: Path, name: str, arch: Arch | None, *, digest: str | None = None, force: bool = False, progress: Progress
) -> Image:
    """Keep a user's own disk image under a name; see `qvm.image.foreign.import_image`."""
    if any(entry.name == name for entry in load_catalogue()):
        raise UsageError(f"{name!r} is a name of the catalogue", hint="choose another with --name")
    return foreign.import_image(path, name, arch, digest=digest, force=force, progress=progress)


def build_image(
    name: str, arch: Arch, *, builder: Builder | None = None, progress: Progress, force: bool = False
) -> Image:
    """Like `ensure_image`; with `force` anew even where the cache has it, with the packages of today."""
    entry = _entry(name, arch)
    current = store.find_current(name, arch, current_key(entry))
    if current is not None and not force:
        return current
    return _make(entry, builder=builder, progress=progress, force=force)


def _make(entry: Entry, *, builder: Builder | None, progress: Progress, force: bool) -> Image:
    lock = paths.cache_home() / "images" / f"{entry.name}-{entry.arch.name}.lock"
    with locks.lock(lock, what=f"the image {entry.name}", on_wait=progress.note):
        current = store.find_current(entry.name, entry.arch, current_key(entry))
        if current is not None and not force:
            return current  # made by whoever held the lock before
        if entry.url is not None:
            return _fetch(entry, progress)
        recipe = find_recipe(entry.name)
        assert recipe is not None
        return build_recipe(recipe, entry.arch, builder=builder, progress=progress, force=force)


def _fetch(entry: Entry, progress: Progress) -> Image:
    """The caller holds the lock of that name."""
    assert entry.url is not None and entry.digest is not None
    with foreign.work_folder(entry.name, entry.arch.name) as work:
        got = foreign.fetch(entry.url, entry.digest, work, progress=progress)
        return foreign.take(got, entry.name, entry.arch, key=entry.digest, work=work, shown=entry.url,
                            digest=entry.digest, movable=True, progress=progress)


def prune_images(*, in_use: Mapping[str, str]) -> list[dict[str, Any]]:
    """Remove images that are current for nothing and that no instance was made from, bases no recipe has, and what
    broken-off downloads have left.

    Imported ones stay; what was made of a file or an address goes, since it can be made again.

    `in_use`: image id -> a profile made from it. Returns what each removed image was.
    """
    entries = load_catalogue()
    kept = {image.id for entry in entries
            if (image := store.find_current(entry.name, entry.arch, current_key(entry))) is not None}
    recipes = [(recipe, entry.arch) for entry in entries if (recipe := find_recipe(entry.name)) is not None]
    bases = {base_key(recipe, arch)[:16] for recipe, arch in recipes}
    for folder in rootfs.bases_dir().glob("*"):
        if folder.is_dir() and folder.name not in bases and ".building" not in folder.name:
            rootfs.discard_base(folder)
    foreign.sweep_unfinished()
    return [store.remove_image(image.id) for image in store.list_images()
            if image.id not in kept and image.id not in in_use
            and not (image.is_imported and foreign.is_current(image))]


def describe_images() -> list[dict[str, Any]]:
    """Every name of the catalogue with what the cache has of it, then all other images in the cache.

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
    names = {entry.name for entry in load_catalogue()}
    for image in images:
        if image.id not in shown:
            ready = image.name not in names and foreign.is_current(image)
            rows.append(image.describe() | {"state": "ready" if ready else "outdated"})
    return rows

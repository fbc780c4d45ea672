"""The catalogue: every image there is a name for, be it a recipe to build or a cloud image to download."""

from __future__ import annotations

from dataclasses import dataclass

from qvm import paths
from qvm.arch import Arch, find_arch
from qvm.errors import ImageError
from qvm.image.recipe import find_recipe, list_recipes


@dataclass(frozen=True, slots=True)
class Entry:
    """One name for one architecture. `url` and `digest` are None for what a recipe builds."""

    name: str
    title: str
    arch: Arch
    url: str | None = None
    digest: str | None = None
    format: str = "raw"
    """Of the file behind `url`: "qcow2" or "raw"."""


def _downloads() -> list[Entry]:
    import yaml

    path = paths.share_dir("images") / "catalogue.yaml"
    entries = []
    try:
        for image in yaml.safe_load(path.read_text())["images"]:
            for name, file in image["files"].items():
                arch = find_arch(name)
                if arch is None:
                    raise ImageError(f"{path}: unknown architecture {name!r} of {image['name']!r}")
                entries.append(Entry(image["name"], image["title"], arch, file["url"], file["digest"],
                                     file.get("format", "qcow2")))
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ImageError(f"cannot read {path}: {error!r}", hint="reinstall qvm") from error
    return entries


def load_catalogue() -> list[Entry]:
    """Recipes first, then downloads, each name once for each architecture."""
    entries = []
    for name in list_recipes():
        recipe = find_recipe(name)
        assert recipe is not None
        entries += [Entry(name, recipe.title, arch) for word in recipe.arches if (arch := find_arch(word))]
    return entries + _downloads()


def find_entry(name: str, arch: Arch) -> Entry | None:
    """The entry called `name` for that architecture, else None."""
    return next((entry for entry in load_catalogue() if entry.name == name and entry.arch == arch), None)

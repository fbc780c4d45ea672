"""Recipes: how an image is made, one YAML file each in `images/`, and the key that tells whether one is current."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qvm import paths
from qvm.agentbundle import agent_source
from qvm.arch import ALL, Arch
from qvm.errors import ImageError
from qvm.units import parse_size

FORMAT = 2
"""Of the image folder and of the build itself: a change here makes every recipe build anew."""

_NOT_RECIPES = ("catalogue.yaml", "tools.yaml")


@dataclass(frozen=True, slots=True)
class Archive:
    """A release archive: `path` is the program inside it."""

    url: str
    sha256: str
    path: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that Debian does not package; see images/tools.yaml."""

    name: str
    version: str
    module: str
    package: str
    stamp: str
    """The Go variable that holds the version."""
    archives: dict[str, Archive] = field(default_factory=dict)
    """By `Arch.name`."""


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    title: str
    suite: str
    components: tuple[str, ...]
    arches: tuple[str, ...]
    root_size: int
    """Bytes of the root file system."""
    packages: tuple[str, ...]
    initramfs_package: str
    exclude: tuple[str, ...]
    include: tuple[str, ...]
    tools: tuple[str, ...]
    initramfs_modules: tuple[str, ...]
    background_modules: tuple[str, ...]
    arch_modules: dict[str, tuple[str, ...]]
    """Background modules of one architecture, by `Arch.name`."""
    plain_modules: tuple[str, ...]
    """Modules that are loaded at nearly every boot: stored without compression."""
    cmdline: str
    mask: tuple[str, ...]
    mask_files: tuple[str, ...]
    """Files of Debian's that a link to /dev/null at these paths overrides."""
    enable: dict[str, tuple[str, ...]]
    """Target unit -> units it wants."""
    disable: dict[str, tuple[str, ...]]
    """Target unit -> units that Debian's packages made it want."""


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ImageError(f"cannot read {path}: {error}") from error
    if not isinstance(data, dict):
        raise ImageError(f"{path} holds no mapping")
    return data


def list_recipes() -> list[str]:
    """Names of the recipes that ship with qvm, the default first."""
    names = [path.stem for path in paths.share_dir("images").glob("*.yaml") if path.name not in _NOT_RECIPES]
    return sorted(names)


def find_recipe(name: str) -> Recipe | None:
    """The recipe called `name`, else None. ImageError where its file is broken."""
    if name not in list_recipes():
        return None
    data = _read_yaml(paths.share_dir("images") / f"{name}.yaml")

    def words(key: str) -> tuple[str, ...]:
        return tuple(str(word) for word in data.get(key) or ())

    def table(key: str) -> dict[str, tuple[str, ...]]:
        return {str(unit): tuple(map(str, wants)) for unit, wants in (data.get(key) or {}).items()}

    try:
        return Recipe(
            name=str(data["name"]), title=str(data["title"]), suite=str(data["suite"]),
            components=words("components"), arches=words("arches"), root_size=parse_size(data["rootSize"]),
            packages=words("packages"), initramfs_package=str(data["initramfsPackage"]), exclude=words("exclude"),
            include=words("include"), tools=words("tools"), initramfs_modules=words("initramfsModules"),
            plain_modules=words("plainModules"),
            background_modules=words("backgroundModules"),
            arch_modules=table("archModules"), cmdline=str(data["cmdline"]).strip(), mask=words("mask"),
            mask_files=words("maskFiles"),
            enable=table("enable"), disable=table("disable"),
        )  # fmt: skip
    except (KeyError, ValueError) as error:
        raise ImageError(f"the recipe {name!r} is broken: {error}") from error


def load_tools() -> dict[str, Tool]:
    """images/tools.yaml, by name."""
    tools = {}
    for name, data in _read_yaml(paths.share_dir("images") / "tools.yaml").items():
        archives = {arch: Archive(**entry) for arch, entry in (data.pop("archives", None) or {}).items()}
        tools[name] = Tool(name=name, archives=archives, **{key: str(value) for key, value in data.items()})
    return tools


@dataclass(frozen=True, slots=True)
class BakedFile:
    """A file that qvm puts into the image. `path` is absolute in the guest."""

    path: str
    mode: int
    data: bytes


def baked_files() -> list[BakedFile]:
    """Everything of `images/files` at its own path, and the agent with its unit from `cloud-init`.

    Scripts (first line "#!") are executable: a wheel does not keep the executable bit.
    """
    root = paths.share_dir("images") / "files"
    found = {f"/{path.relative_to(root).as_posix()}": path for path in sorted(root.rglob("*"))
             if path.is_file() and not path.name.startswith(".")}
    guest = paths.share_dir("cloud-init")
    found["/usr/lib/systemd/system/qvm-agent.service"] = guest / "qvm-agent.service"
    files = []
    for target, source in sorted(found.items()):
        try:
            data = source.read_bytes()
        except OSError as error:
            raise ImageError(f"cannot read {source}: {error.strerror}") from error
        files.append(BakedFile(target, 0o755 if data.startswith(b"#!") else 0o644, data))
    files.append(BakedFile("/usr/lib/qvm/agent.py", 0o644, agent_source()))
    return sorted(files, key=lambda file: file.path)


def init_script() -> bytes:
    return (paths.share_dir("images") / "initramfs" / "init").read_bytes()


def build_scripts() -> list[Path]:
    """What makes a base, the one that is started first."""
    names = ("build.sh", "build-install.sh", "build-disk.sh", "compile.py")
    return [paths.share_dir("images") / name for name in names]


def compile_script() -> Path:
    return paths.share_dir("images") / "compile.py"


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def base_key(recipe: Recipe, arch: Arch) -> str:
    """Names the part of an image that comes from the mirror: packages, and how they are unpacked."""
    parts = asdict(recipe)
    # What is decided after the packages are there; "tools" are programs of their own.
    for later in ("title", "cmdline", "mask", "mask_files", "enable", "disable", "tools", "initramfs_modules",
                  "background_modules", "arch_modules"):
        del parts[later]
    scripts = [hashlib.sha256(script.read_bytes()).hexdigest() for script in build_scripts()]
    return _digest([FORMAT, parts, arch.name, scripts])


def image_key(recipe: Recipe, arch: Arch) -> str:
    """Names everything an image is made of, as far as qvm decides it: the same key, the same image."""
    tools = [asdict(load_tools()[name]) for name in recipe.tools]
    baked = [(file.path, file.mode, hashlib.sha256(file.data).hexdigest()) for file in baked_files()]
    init = hashlib.sha256(init_script()).hexdigest()
    return _digest([base_key(recipe, arch), asdict(recipe), tools, baked, init])


def check_arch(recipe: Recipe, arch: Arch) -> None:
    """ImageError where the recipe does not serve that architecture."""
    if arch.name not in recipe.arches:
        known = ", ".join(each.name for each in ALL if each.name in recipe.arches)
        raise ImageError(f"there is no recipe of {recipe.name!r} for {arch.name}", hint=f"it exists for {known}")

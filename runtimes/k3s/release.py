"""Releases of k3s: their names, what they consist of, and how they come into the host's cache.

A release has a list of SHA-256 digests for each architecture (`sha256sum-amd64.txt`), and nothing is used that is not
in it. What is in the cache once needs no network any more. Layout of releases: docs.k3s.io, "Air-Gap Install".
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from qvm.errors import ImageError, UsageError
from qvm.runtime.base import Progress
from qvm.runtime.fetch import digest_of, download, mirrored
from qvm.runtime.hostfiles import lock, replace_file

_TIMEOUT = (10.0, 30.0)
_EXACT = re.compile(r"v(\d+)\.(\d+)\.(\d+)(-[0-9A-Za-z.]+)?\+k3s(\d+)")
_ARCHES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "s390x": "s390x", "riscv64": "riscv64"}
_SUFFIX = {"amd64": "", "arm": "-armhf"}
VERIFIED = "verified.json"
_resolved: dict[str, str] = {}
"""Channels that this process has resolved: what one command does is done for one release."""


@dataclass(frozen=True, slots=True)
class Source:
    default: str
    releases: str
    channels: str


@dataclass(frozen=True, slots=True)
class Artifacts:
    """What one k3s consists of, on the host."""

    version: str
    binary: Path
    digest: str
    """SHA-256 of the binary."""
    images: tuple[Path, ...]
    """Archives of container images."""


@cache
def load_source() -> Source:
    return Source(**yaml.safe_load((Path(__file__).parent / "release.yaml").read_text()))


def go_arch(arch: str) -> str:
    """The release's word for a guest's architecture; UsageError where k3s has none."""
    if arch not in _ARCHES:
        raise UsageError(f"there is no k3s for {arch}", hint=f"there is one for {', '.join(_ARCHES)}")
    return _ARCHES[arch]


def binary_name(arch: str) -> str:
    word = go_arch(arch)
    return "k3s" + _SUFFIX.get(word, f"-{word}")


def images_name(arch: str) -> str:
    return f"k3s-airgap-images-{go_arch(arch)}.tar.zst"


def list_name(arch: str) -> str:
    return f"sha256sum-{go_arch(arch)}.txt"


def artifact_url(version: str, name: str) -> str:
    """The `+` of a version is escaped: servers may take it for a space."""
    return f"{load_source().releases.rstrip('/')}/{quote(version, safe='')}/{name}"


def parse_list(text: str) -> dict[str, str]:
    """Name -> SHA-256, of what `sha256sum` prints."""
    found = {}
    for line in text.splitlines():
        digest, _, name = line.strip().partition(" ")
        if re.fullmatch("[0-9a-f]{64}", digest) and name.strip(" *"):
            found[name.strip(" *").removeprefix("./")] = digest
    return found


def exact_version(wish: str) -> str | None:
    """The release that a wish names without asking anybody; None for a channel."""
    if not wish:
        return load_source().default
    text = wish if wish.startswith("v") or not wish[0].isdigit() else f"v{wish}"
    if _EXACT.fullmatch(text):
        return text
    return f"{text}+k3s1" if re.fullmatch(r"v\d+\.\d+\.\d+(-[0-9A-Za-z.]+)?", text) else None


def resolve(wish: str, cache_folder: Path, progress: Progress) -> str:
    """The release that a wish means now. Without network a channel stands for what it last stood for."""
    exact = exact_version(wish)
    if exact is not None:
        return exact
    if wish in _resolved:
        return _resolved[wish]
    known = cache_folder / "channels.json"
    try:
        channels = _fetch_channels()
    except ImageError as error:
        channels = _load_channels(known)
        if _channel(channels, wish) is None:
            raise
        progress.note(f"{error.message}; {wish} is taken to be {_channel(channels, wish)}, as it was last time")
    else:
        cache_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(known, json.dumps(channels, indent=1).encode(), mode=0o644, durable=False)
    found = _channel(channels, wish)
    if found is None:
        raise UsageError(f"k3s has no channel {wish!r}", hint=f"there are: {', '.join(sorted(channels)[-8:])}")
    _resolved[wish] = found
    return found


def meaning_of(wish: str) -> str:
    """The release that a wish means, as far as this process has found out."""
    return exact_version(wish) or _resolved.get(wish, wish)


def resolve_known(wish: str, cache_folder: Path | None) -> str:
    """The same from what is known already; the wish itself where that is nothing."""
    channels = _load_channels(cache_folder / "channels.json") if cache_folder is not None else {}
    return exact_version(wish) or _channel(channels, wish) or wish


def obtain(version: str, arch: str, cache_folder: Path, progress: Progress) -> Artifacts:
    """Binary and images of a release, from the cache or fetched into it.

    Raises what `download` raises, and ImageError where the release has no list of digests or lacks a file.
    """
    folder = cache_folder / version
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (found := find(version, arch, cache_folder)) is not None:
        return found
    with lock(folder / ".lock", what=f"k3s {version}"):
        # Whoever had the lock before may have fetched the same.
        return find(version, arch, cache_folder) or _fetch(version, arch, folder, progress)


def _fetch(version: str, arch: str, folder: Path, progress: Progress) -> Artifacts:
    names = (binary_name(arch), images_name(arch))
    digests = _obtain_list(version, arch, folder)
    verified = _load_verified(folder)
    for name in names:
        if name not in digests:
            raise ImageError(f"the release {version} of k3s has no {name}", hint="choose another version")
        path = download(artifact_url(version, name), f"sha256:{digests[name]}", folder / name, progress=progress)
        verified[name] = [digests[name], path.stat().st_size, path.stat().st_mtime_ns]
        replace_file(folder / VERIFIED, json.dumps(verified).encode(), mode=0o644, durable=False)
    return Artifacts(version, folder / names[0], str(verified[names[0]][0]), (folder / names[1],))


def find(version: str, arch: str, cache_folder: Path) -> Artifacts | None:
    """What `obtain` has brought into the cache, as long as it is unchanged."""
    folder = cache_folder / version
    verified = _load_verified(folder)
    binary, images = folder / binary_name(arch), folder / images_name(arch)
    if not _unchanged(binary, verified) or not _unchanged(images, verified):
        return None
    return Artifacts(version, binary, str(verified[binary.name][0]), (images,))


def supplied(place: Path) -> Artifacts:
    """The k3s that QVM_K3S names: a binary, or a folder with one and with archives of images."""
    binary = place / "k3s" if place.is_dir() else place
    if not binary.is_file():
        raise UsageError(f"QVM_K3S names {place}, and there is no k3s",
                         hint="name a binary, or a folder that has `k3s` and archives of images")
    images = sorted(path for path in place.glob("*.tar*") if path.is_file()) if place.is_dir() else []
    stat = binary.stat()
    return Artifacts("supplied", binary, _digest(binary, stat.st_size, stat.st_mtime_ns), tuple(images))


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    """Of a large file, once for each content that a process sees."""
    return digest_of(path, "sha256")


def _obtain_list(version: str, arch: str, folder: Path) -> dict[str, str]:
    path = folder / list_name(arch)
    if not path.exists():
        text = _get(artifact_url(version, path.name), what=f"the list of digests of k3s {version}")
        if not parse_list(text):
            raise ImageError(f"{artifact_url(version, path.name)} is no list of SHA-256 digests", hint="set QVM_MIRROR")
        replace_file(path, text.encode(), mode=0o644, durable=False)
    return parse_list(path.read_text())


def _fetch_channels() -> dict[str, str]:
    text = _get(load_source().channels, what="the list of k3s's channels")
    try:
        return {str(row["id"]): str(row["latest"]) for row in json.loads(text)["data"] if row.get("latest")}
    except (ValueError, KeyError, TypeError) as error:
        raise ImageError(f"{load_source().channels} is no list of channels", details=str(error)) from error


def _get(url: str, *, what: str) -> str:
    import requests

    source = mirrored(url, os.environ.get("QVM_MIRROR"))
    hint = "check the network and http_proxy, or set QVM_MIRROR"
    try:
        reply = requests.get(source, timeout=_TIMEOUT)
    except requests.RequestException as error:
        raise ImageError(f"{what} cannot be fetched", details=f"{source}: {error}", hint=hint) from error
    if reply.status_code != 200:
        missing = "; there may be no such release" if reply.status_code == 404 else ""
        raise ImageError(f"{what} cannot be fetched: HTTP {reply.status_code}{missing}", details=source, hint=hint)
    return str(reply.text)


def _channel(channels: dict[str, str], wish: str) -> str | None:
    return channels.get(wish) or channels.get(f"v{wish}")


def _load_channels(path: Path) -> dict[str, str]:
    try:
        return {str(name): str(version) for name, version in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}  # nothing was ever heard


def _load_verified(folder: Path) -> dict[str, list[Any]]:
    """Name -> digest, size and time of change of what has been checked."""
    try:
        return dict(json.loads((folder / VERIFIED).read_text()))
    except (OSError, ValueError):
        return {}  # then it is checked again


def _unchanged(path: Path, verified: dict[str, list[Any]]) -> bool:
    try:
        found = path.stat()
        return verified[path.name][1:] == [found.st_size, found.st_mtime_ns]
    except (OSError, KeyError, IndexError):
        return False

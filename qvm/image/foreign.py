"""Images that qvm did not make: a user's own under a name, a file, or an address with its digest.

    qvm image import my.qcow2 --name mine     kept until `image rm`
    qvm start --image ./my.qcow2              made again when the file changes
    qvm start --image https://...#sha256:...  downloaded once

All of them come in by `qvm.image.admit`, and are kept as raw disks that boot by UEFI.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from qvm import locks, paths
from qvm.arch import Arch
from qvm.errors import DigestMismatchError, ImageError, LockHeldError, UsageError
from qvm.image import store
from qvm.image.admit import admit, choose_arch
from qvm.image.download import digest_of, download, parse_digest
from qvm.image.headers import read_header
from qvm.image.store import Image
from qvm.progress import Progress

DISK = "disk.raw"
_SUFFIXES = re.compile(r"\.(qcow2|qcow|img|raw|gz|xz|zst)$")
_IMPORTED = "imported"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image comes from, when it has no name of its own: a file, or an address with a digest."""

    path: Path | None = None
    url: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """For lists and file names; tells places of equal file names apart."""
        whole = f"{self.url}#{self.digest}" if self.path is None else str(self.path)
        file = PurePosixPath(urlsplit(self.url).path).name if self.path is None else self.path.name
        return f"{plain_name(file)}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"

    @property
    def key(self) -> str:
        """Changes when the file does. ImageError where it is not there."""
        if self.path is None:
            return self.digest
        stat = _stat(self.path)
        return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"

    @property
    def shown(self) -> str:
        return self.url if self.path is None else str(self.path)


def plain_name(file: str) -> str:
    """A file's name as an image can have it: without the endings that say what it is."""
    while (shorter := _SUFFIXES.sub("", file.lower())) != file:
        file = shorter
    return re.sub(r"[^a-z0-9._+-]+", "-", file).strip("-._+")[:40] or "image"


def parse_place(text: str) -> Place | None:
    """The place that `--image` names; None where it is a name. ImageError for an address without a digest."""
    if "://" in text:
        url, _, digest = text.partition("#")
        if not digest:
            raise ImageError(f"{url} has no digest, and nothing is fetched without one",
                             hint="put the one its publisher gives behind it: URL#sha256:...")
        return Place(url=url, digest=str(parse_digest(digest)))
    return Place(path=Path(text).expanduser().absolute()) if "/" in text else None


def find_place(place: Place, arch: Arch) -> Image | None:
    """The image made from that place as it is now; None where it has to be made."""
    return store.find_current(place.name, arch, place.key)


def ensure_place(place: Place, arch: Arch, *, progress: Progress) -> Image:
    """The image at that place, for `arch`. Raises ImageError, NoSpaceError or HostError with what stands in the way."""
    found = find_place(place, arch)
    if found is not None:
        return found
    with _making(place.name, arch.name, progress) as work:
        found = find_place(place, arch)
        if found is not None:
            return found
        key = place.key
        if place.path is not None:
            return take(place.path, place.name, arch, key=key, work=work, shown=place.shown, progress=progress)
        got = fetch(place.url, place.digest, work, progress=progress)
        return take(got, place.name, arch, key=key, work=work, shown=place.shown, digest=place.digest, movable=True,
                    progress=progress)


def fetch(url: str, digest: str, work: Path, *, progress: Progress) -> Path:
    """Download into `work`, where the part that arrived waits for the next try when the transfer breaks off."""
    name = PurePosixPath(urlsplit(url).path).name or "image"
    return download(url, digest, work / name, progress=progress)


def import_image(
    path: Path, name: str, arch: Arch | None, *, digest: str | None = None, force: bool = False, progress: Progress
) -> Image:
    """Keep a user's disk image under a name. `arch` None: found in the image.

    `digest`: what the file must have. Importing the same content again changes nothing; other content under a name
    that is taken needs `force`. Raises UsageError, ImageError, NoSpaceError.
    """
    _stat(path)
    read_header(path)  # what is refused anyway need not be read to its end first
    with _making(name, "any", progress) as work:
        found = _checked_digest(path, digest, progress)
        return take(path, name, arch, key=_IMPORTED, work=work, shown=str(path.absolute()), digest=found, kept=True,
                    replace=force, progress=progress)


def _checked_digest(path: Path, wanted: str | None, progress: Progress) -> str:
    expected = parse_digest(wanted) if wanted is not None else None
    algorithm = expected.algorithm if expected is not None else "sha256"
    with progress.step(f"reading {path.name}", total=path.stat().st_size, unit="B") as step:
        found = digest_of(path, algorithm, step=step)
    if expected is not None and found != expected.value:
        raise DigestMismatchError(f"{path} is not the file that the digest is for",
                                  details=f"expected {expected}\ngot      {algorithm}:{found}")
    return f"{algorithm}:{found}"


def find_imported(name: str, arch: Arch) -> Image | None:
    return store.find_current(name, arch, _IMPORTED)


def is_current(image: Image) -> bool:
    """Whether the image is what its own name refers to."""
    named = store.find_named(image.name, image.arch)
    return named is not None and named.id == image.id


def take(
    source: Path, name: str, arch: Arch | None, *, key: str, work: Path, shown: str, digest: str | None = None,
    kept: bool = False, replace: bool = True, movable: bool = False, progress: Progress,
) -> Image:
    """Admit `source` and publish it as `name`; the caller holds the lock of that name.

    `kept`: only the user removes it. `movable`: `source` is ours and may be used up. With `replace` off, UsageError
    where the name stands for other content already.
    """
    folder = work / "image"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    admit(source, folder / DISK, progress=progress, movable=movable)
    arch = choose_arch(folder / DISK, arch, what=source.name)
    manifest = {
        "name": name, "arch": arch.name, "format": "raw", "cmdline": "", "files": {"disk": DISK}, "source": shown,
        "digest": digest, "imported": kept,
    }  # fmt: skip
    with progress.step(f"sealing {name}"):
        image_id = store.seal(folder, manifest)
        present = store.find_named(name, arch)
        if present is not None and present.id != image_id and not replace:
            raise UsageError(f"there is an image {name!r} for {arch.name} already, with other content",
                             hint=f"--force replaces it; `qvm image rm {name}` removes it")
        return store.publish(folder, image_id, key=key)


@contextmanager
def _making(name: str, arch: str, progress: Progress) -> Iterator[Path]:
    """A folder to make the image in, held by us alone."""
    root = paths.ensure_private_dir(store.images_dir())
    with (
        locks.lock(root / f"{name}-{arch}.lock", what=f"the image {name}", on_wait=progress.note),
        work_folder(name, arch) as work,
    ):
        yield work


@contextmanager
def work_folder(name: str, arch: str) -> Iterator[Path]:
    """For whoever holds the lock of that image. Empty afterwards, but for a download that can be continued."""
    work = paths.ensure_private_dir(paths.ensure_private_dir(store.images_dir()) / f".fetching-{name}-{arch}")
    try:
        yield work
    finally:
        _tidy(work)


def sweep_unfinished() -> None:
    """Remove what killed imports and broken-off downloads have left, where nobody works on it."""
    for folder in store.images_dir().glob(".fetching-*"):
        name = folder.name.removeprefix(".fetching-")
        try:
            with locks.lock(folder.with_name(f"{name}.lock"), what=f"the image {name}", timeout=0):
                shutil.rmtree(folder, ignore_errors=True)
        except LockHeldError:
            continue


def _tidy(work: Path) -> None:
    for entry in work.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif not entry.name.endswith((".part", ".part.json", ".lock")):
            entry.unlink()
    if not any(entry.name.endswith(".part") for entry in work.iterdir()):
        shutil.rmtree(work)


def _stat(path: Path) -> os.stat_result:
    try:
        stat = path.stat()
    except OSError as error:
        raise ImageError(f"cannot read the image {path}: {error.strerror}") from error
    if not path.is_file():
        raise ImageError(f"{path} is no regular file", hint="give the path of a disk image")
    return stat

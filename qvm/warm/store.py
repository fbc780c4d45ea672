"""Finished warm images in the cache: found by key, pinned by the instances on top of them, pruned by last use.

    cache_home()/warm/<key>-<random>/  root.qcow2 data.qcow2 ram devices seed.iso idle/ manifest.json pins/ synced
    cache_home()/warm/.<key>-*         one in the making; its maker holds <key>.lock, without a holder it is rubbish

Everything in a folder is read-only for ever, except `pins` and the time of `manifest.json`, which is that of the last
use. A folder without a manifest is no warm image any more, but stays while disks of instances lie on its root disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvm import paths
from qvm.errors import HostError, QvmError
from qvm.filenames import FIRMWARE_VARS
from qvm.qemu.hostinfo import read_boot_id
from qvm.units import GiB

MANIFEST = "manifest.json"
SYNCED = "synced"
SPENT = "spent"
"""Of one that may be forked once only: it has been. Its root disk stays while the fork's lies on it."""
SPENT_GRACE = 3600.0
"""Seconds after which one that was spent on a start that never made a disk is rubbish."""
DEFAULT_LIMIT = 10 * GiB
"""Bytes on disk that warm images may take together, those in use aside; `QVM_WARM_LIMIT` (bytes) says otherwise."""


@dataclass(frozen=True, slots=True)
class WarmImage:
    key: str
    folder: Path
    manifest: dict[str, Any]

    @property
    def root_disk(self) -> Path:
        return self.folder / "root.qcow2"

    @property
    def data_disk(self) -> Path:
        return self.folder / "data.qcow2"

    @property
    def ram(self) -> Path:
        return self.folder / "ram"

    @property
    def devices(self) -> Path:
        """The device state."""
        return self.folder / "devices"

    @property
    def firmware_vars(self) -> Path:
        """There only where the machine booted by UEFI."""
        return self.folder / FIRMWARE_VARS

    @property
    def stage(self) -> str:
        return str(self.manifest["stage"])

    @property
    def title(self) -> str:
        return str(self.manifest["title"])

    @property
    def runtime_version(self) -> str:
        return str(self.manifest["runtime_version"])

    def size(self) -> int:
        """Bytes on disk."""
        return sum(entry.stat().st_blocks * 512 for entry in self.folder.iterdir() if entry.is_file())

    @property
    def last_used(self) -> float:
        """Seconds since the epoch."""
        return (self.folder / MANIFEST).stat().st_mtime

    def describe(self) -> dict[str, Any]:
        """For `image warm --list` and --json."""
        return {
            "key": self.key, "title": self.title, "image": self.manifest["image"], "runtime": self.manifest["runtime"],
            "stage": self.stage, "arch": self.manifest["arch"], "cpus": self.manifest["cpus"],
            "memory": self.manifest["memory"], "size": self.size(), "created": self.manifest["created"],
            "last_used": self.last_used, "in_use": is_in_use(self), "folder": str(self.folder),
            "spent": (self.folder / SPENT).exists(),
        }  # fmt: skip


def warm_dir() -> Path:
    return paths.cache_home() / "warm"


def lock_path(key: str) -> Path:
    return warm_dir() / f"{key}.lock"


def find_warm(key: str) -> WarmImage | None:
    """The finished warm image of that key; None where there is none, or none that can be trusted or is left."""
    return next(iter(find_fresh(key)), None)


def find_fresh(key: str) -> list[WarmImage]:
    """All that can be forked. There are several only of those that may be forked once."""
    found = (load_warm(folder) for folder in sorted(warm_dir().glob(f"{key}-*")))
    return [warm for warm in found if warm is not None and not (warm.folder / SPENT).exists()]


def spend(warm: WarmImage) -> bool:
    """Take one that may be forked once; False where another was quicker."""
    try:
        os.close(os.open(warm.folder / SPENT, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def load_warm(folder: Path) -> WarmImage | None:
    """The warm image in that folder; None where it is not whole.

    One whose RAM may not have reached the disk counts only until the host boots again.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        settled = (folder / SYNCED).exists() or manifest["host_boot"] == read_boot_id()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return WarmImage(folder.name.partition("-")[0], folder, manifest) if whole and settled else None


def _folders() -> list[Path]:
    folder = warm_dir()
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]


def list_warm() -> list[WarmImage]:
    return [warm for folder in _folders() if (warm := load_warm(folder)) is not None]


def pin(warm: WarmImage, disk: Path) -> None:
    """Keep the warm image while `disk` (an overlay on its root disk) exists."""
    pins = warm.folder / "pins"
    pins.mkdir(exist_ok=True)
    (pins / hashlib.sha256(os.fsencode(disk)).hexdigest()[:16]).write_text(str(disk))


def pin_below(image: Path, disk: Path) -> None:
    """Keep what `image` is part of while `disk` exists, where that is a warm image."""
    warm = image.parent
    if warm.parent == warm_dir():
        pin(WarmImage(warm.name.partition("-")[0], warm, {}), disk)


@contextmanager
def using(warm: WarmImage) -> Iterator[None]:
    """Mark the warm image as used now, and keep it from being pruned while the block runs.

    Raises HostError where it has gone meanwhile.
    """
    try:
        fd = os.open(warm.folder / MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"the warm image {warm.title} was removed meanwhile") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        if load_warm(warm.folder) is None:
            raise HostError(f"the warm image {warm.title} was removed meanwhile")
        os.utime(warm.folder / MANIFEST)
        yield
    finally:
        os.close(fd)


def is_in_use(warm: WarmImage) -> bool:
    return _is_pinned(warm.folder) or not _claim(warm, remove=False)


def _is_pinned(folder: Path) -> bool:
    pins = folder / "pins"
    if not pins.is_dir():
        return False
    for entry in pins.iterdir():
        if os.path.lexists(entry.read_text()):
            return True
        entry.unlink(missing_ok=True)
    return False


def _claim(warm: WarmImage, *, remove: bool) -> bool:
    """Whether nobody is using it; with `remove`, it is gone then, before anybody new could begin."""
    fd = os.open(warm.folder / MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if remove:
            (warm.folder / MANIFEST).unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def remove_warm(warm: WarmImage) -> bool:
    """Delete it; False where an instance or a running machine needs it."""
    if _is_pinned(warm.folder) or not _claim(warm, remove=True):
        return False
    shutil.rmtree(warm.folder)
    return True


def discard_warm(warm: WarmImage) -> None:
    """Make sure that a warm image that did not work is not tried again; what its users hold stays theirs."""
    (warm.folder / MANIFEST).unlink(missing_ok=True)
    _remove_leftovers()


def prune_warm(*, limit: int | None = None, keep: str = "") -> list[WarmImage]:
    """Remove what was used longest ago until the rest takes at most `limit` bytes, never `keep` nor what is in use.

    Returns what was removed. `limit` None: the environment's or the default one.
    """
    _remove_leftovers()
    bound = warm_limit() if limit is None else limit
    images = sorted(list_warm(), key=lambda warm: warm.last_used)
    total = sum(warm.size() for warm in images)
    removed = []
    for warm in images:
        if total <= bound:
            break
        size = warm.size()
        if warm.key != keep and remove_warm(warm):
            total -= size
            removed.append(warm)
    return removed


def warm_limit() -> int:
    text = os.environ.get("QVM_WARM_LIMIT", "")
    if not text:
        return DEFAULT_LIMIT
    if not text.isdigit():
        raise QvmError(f"QVM_WARM_LIMIT={text!r} is no number of bytes")
    return int(text)


def sweep(key: str) -> None:
    """Remove what killed makers of `key` left; its lock must be held."""
    for entry in warm_dir().glob(f".{key}-*"):
        shutil.rmtree(entry, ignore_errors=True)


def _remove_leftovers() -> None:
    """Folders that are no warm images any more and that nothing lies on."""
    for folder in _folders():
        if (load_warm(folder) is None or _is_long_spent(folder)) and not _is_pinned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_long_spent(folder: Path) -> bool:
    try:
        return time.time() - (folder / SPENT).stat().st_mtime > SPENT_GRACE
    except OSError:
        return False

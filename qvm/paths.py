"""Where things live: the folders a user may move by environment variables, and the files that ship with qvm."""

from __future__ import annotations

import os
from pathlib import Path

from qvm.errors import HostError


def home() -> Path:
    """`QVM_HOME` or ~/.qvm: profiles, instances, data disks."""
    return Path(os.environ.get("QVM_HOME") or Path.home() / ".qvm").expanduser().absolute()


def cache_home() -> Path:
    """`QVM_CACHE_HOME` or $XDG_CACHE_HOME/qvm: images, packages, downloads, probe results. Safe to delete."""
    explicit = os.environ.get("QVM_CACHE_HOME")
    if explicit:
        return Path(explicit).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").expanduser().absolute() / "qvm"


def profile_dir(profile: str) -> Path:
    """What users look at: the profile file and the sockets."""
    return home() / profile


def instances_dir() -> Path:
    return home() / "_instances"


def instance_dir(profile: str) -> Path:
    """What qvm keeps for one instance."""
    return instances_dir() / profile


def data_dir() -> Path:
    """Data disks, which survive `delete`."""
    return home() / "_data"


def share_dir(name: str) -> Path:
    """A folder that ships with qvm: "images" or "cloud-init"; from a checkout and from a wheel alike."""
    package = Path(__file__).resolve().parent
    for candidate in (package.parent / name, package.parent / "qvm_share" / name):
        if candidate.is_dir():
            return candidate
    raise HostError(f"qvm's own folder {name!r} is missing from this installation",
                    hint="reinstall qvm: pip install --force-reinstall qvm")


def ensure_private_dir(path: Path) -> Path:
    """Make `path` with mode 0700 (parents too) and return it; HostError where the host refuses."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    except OSError as error:
        raise HostError(f"cannot write to {path}: {error.strerror}",
                        hint="set QVM_HOME and QVM_CACHE_HOME to folders you can write to") from error
    return path


def replace_file(path: Path, data: bytes, *, mode: int = 0o600, durable: bool = True) -> None:
    """Write a file in one step: readers see the old content or the new one, and nobody more than `mode` allows.

    `durable`: the content is on the disk before it takes the place of the old. OSError where the host refuses; nothing
    half-written stays.
    """
    import tempfile

    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk before going on (fsync)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

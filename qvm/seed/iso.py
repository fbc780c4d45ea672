"""The seed's ISO image: what cloud-init's NoCloud source and our agent read from a disk labelled cidata."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qvm.errors import HostError
from qvm.paths import replace_file

VOLUME = "cidata"
_DATE = 1577836800.0
"""2020-01-01, seconds since the epoch."""
_clock_lock = threading.Lock()


def iso_name(name: str) -> str:
    """A file's plain ISO 9660 name: upper case, no signs but one dot, e.g. "META_DATA.;1" for meta-data."""
    stem, _, extension = name.partition(".")
    clean = "".join(letter if letter.isalnum() else "_" for letter in stem.upper())
    return f"/{clean}.{extension.upper()};1"


@contextmanager
def _fixed_clock() -> Iterator[None]:
    """pycdlib stamps everything with time.time() and takes no date: give its modules a clock that stands still."""
    import pycdlib.headervd
    import pycdlib.pycdlib

    modules: tuple[Any, ...] = (pycdlib.pycdlib, pycdlib.headervd)
    with _clock_lock:
        before = [module.time for module in modules]
        for module in modules:
            module.time = SimpleNamespace(time=lambda: _DATE)
        try:
            yield
        finally:
            for module, clock in zip(modules, before, strict=True):
                module.time = clock


def build_iso(files: Mapping[str, bytes]) -> bytes:
    """An ISO 9660 image with Rock Ridge and Joliet names and mode 0400 inside; the same input gives the same bytes."""
    import pycdlib

    with _fixed_clock():
        iso: Any = pycdlib.PyCdlib()
        iso.new(interchange_level=3, joliet=3, rock_ridge="1.09", vol_ident=VOLUME, sys_ident="LINUX")
        for name in sorted(files):
            data = files[name]
            iso.add_fp(io.BytesIO(data), len(data), iso_name(name), rr_name=name, joliet_path=f"/{name}",
                       file_mode=0o100400)
        out = io.BytesIO()
        iso.write_fp(out)
        iso.close()
    return out.getvalue()


def write_iso(files: Mapping[str, bytes], path: Path) -> bool:
    """Write the image to `path`, whole or not at all, 0600; True where it differed from what was there."""
    data = build_iso(files)
    try:
        if path.exists() and path.read_bytes() == data:
            path.chmod(0o600)
            return False
        replace_file(path, data, durable=False)
    except OSError as error:
        raise HostError(f"cannot write the seed {path}: {error.strerror}",
                        hint="check the free space and the rights of that folder") from error
    return True

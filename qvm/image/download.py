"""Downloads that are only ever seen whole and right: resumable, digest-checked, one at a time for each file.

What arrived so far stays beside the target as `<name>.part`, with the server's validator in `<name>.part.json`. A next
try asks for the rest with Range and If-Range (RFC 9110, 13.1.5 and 14.2), so a file that changed meanwhile comes
whole again. `requests` takes proxies from http_proxy, https_proxy and no_proxy.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from qvm import locks, paths
from qvm.errors import DigestMismatchError, HostError, ImageError, NoSpaceError
from qvm.progress import Progress, Step
from qvm.units import KiB, MiB, format_size

if TYPE_CHECKING:
    import requests

_CHUNK = 64 * KiB
"""At most this much of what arrived is lost when a connection breaks."""
_TIMEOUT = (15.0, 60.0)
"""Seconds to connect, and between two pieces of data."""
_TRIES = 4
"""How often a transfer that breaks off is taken up again before the user is asked to."""
_ALGORITHMS = {"sha256": 64, "sha512": 128}
_RESERVE = 64 * MiB


@dataclass(frozen=True, slots=True)
class Digest:
    algorithm: str
    value: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value}"


def parse_digest(text: str) -> Digest:
    """"sha256:..." or "sha512:..."; ImageError for anything else: nothing is fetched without a digest."""
    algorithm, _, value = text.strip().lower().partition(":")
    if _ALGORITHMS.get(algorithm) != len(value) or not re.fullmatch("[0-9a-f]+", value):
        raise ImageError(f"{text!r} is no digest", hint="write sha256: with 64, or sha512: with 128 hexadecimal digits")
    return Digest(algorithm, value)


def mirrored(url: str, mirror: str | None) -> str:
    """`url` with scheme and host replaced by those of `mirror` (QVM_MIRROR), whose path goes before the file's."""
    if not mirror:
        return url
    base = urlsplit(mirror if "://" in mirror else f"https://{mirror}")
    parts = urlsplit(url)
    return urlunsplit((base.scheme, base.netloc, base.path.rstrip("/") + parts.path, parts.query, ""))


def digest_of(path: Path, algorithm: str, *, step: Step | None = None) -> str:
    hasher = hashlib.new(algorithm)
    done = 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            hasher.update(data)
            done += len(data)
            if step is not None:
                step.update(done)
    return hasher.hexdigest()


def download(url: str, digest: str, dest: Path, *, progress: Progress) -> Path:
    """Have the file at `dest`, with that digest; returns `dest`.

    A file already there is checked and kept. Two processes at once download once. Raises DigestMismatchError (the file
    is removed), NoSpaceError, or ImageError for everything a server or the network does (what arrived is kept).
    """
    wanted = parse_digest(digest)
    paths.ensure_private_dir(dest.parent)
    with locks.lock(dest.with_name(dest.name + ".lock"), what=dest.name, on_wait=progress.note):
        if dest.is_file():
            if digest_of(dest, wanted.algorithm) == wanted.value:
                return dest
            dest.unlink()
        source = mirrored(url, os.environ.get("QVM_MIRROR"))
        part = dest.with_name(dest.name + ".part")
        with progress.step(f"downloading {dest.name}", unit="B") as step:
            _fetch(source, part, step)
        with progress.step(f"checking {dest.name}", total=part.stat().st_size, unit="B") as step:
            _check(part, wanted, source, step)
        paths.sync(part)
        part.rename(dest)
        _state(part).unlink(missing_ok=True)
    return dest


def _check(part: Path, wanted: Digest, source: str, step: Step) -> None:
    found = digest_of(part, wanted.algorithm, step=step)
    if found == wanted.value:
        return
    part.unlink()
    _state(part).unlink(missing_ok=True)
    raise DigestMismatchError(
        f"{source} is not the file that was pinned; it was removed",
        details=f"expected {wanted}\ngot      {wanted.algorithm}:{found}",
        hint="try again; if it persists the mirror serves another file: unset QVM_MIRROR, or update qvm",
    )


def _state(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _validator(headers: Mapping[str, str]) -> str | None:
    """What If-Range may carry: a strong ETag, else the date of the last change."""
    etag = headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    return headers.get("Last-Modified")


def _known(part: Path, url: str) -> tuple[int, str | None]:
    """(bytes there, validator) of an earlier try for the same address; (0, None) where it cannot be continued."""
    try:
        state: dict[str, Any] = json.loads(_state(part).read_text())
        size = part.stat().st_size
    except (OSError, ValueError):
        return 0, None
    if state.get("url") != url or not state.get("validator"):
        return 0, None
    return size, str(state["validator"])


def _fetch(url: str, part: Path, step: Step) -> None:
    """Bring the whole of `url` into `part`; a transfer that breaks off is taken up again as long as it gets on."""
    import requests

    last: Exception | None = None
    for _ in range(_TRIES):
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_once(url, part, step)
            return
        except (requests.RequestException, _TruncatedError) as error:
            last = error
        if (part.stat().st_size if part.exists() else 0) <= before:
            break
    raise ImageError(f"cannot download {url}", details=str(last),
                     hint="check the network and http_proxy, or set QVM_MIRROR; the next try goes on where this ended")


class _TruncatedError(Exception):
    """The connection ended before the announced length."""


def _fetch_once(url: str, part: Path, step: Step) -> None:
    import requests

    have, validator = _known(part, url)
    # Without compression: the digest is that of the file, and ranges count the file's bytes.
    headers = {"Accept-Encoding": "identity"}
    if have and validator:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as reply:
        if reply.status_code == 416:
            # Nothing left to send: either it was complete, and the digest will say so, or it is not this file.
            return
        if reply.status_code not in (200, 206):
            raise ImageError(f"cannot download {url}: HTTP {reply.status_code}",
                             hint="the file may have moved: update qvm, or set QVM_MIRROR to a server that has it")
        _store(reply, part, url, have if reply.status_code == 206 else 0, step)


def _total(reply: requests.Response, start: int) -> int | None:
    """Length of the whole file as the server announced it."""
    length = reply.headers.get("Content-Length")
    return start + int(length) if length and length.isdigit() else None


def _store(reply: requests.Response, part: Path, url: str, start: int, step: Step) -> None:
    if start and not (reply.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
        raise ImageError(f"{url} answered with another part of the file than asked for", hint="set QVM_MIRROR")
    total = _total(reply, start)
    if total is not None:
        _check_space(part.parent, total - start)
    validator = _validator(reply.headers)
    _state(part).write_text(json.dumps({"url": url, "validator": validator}) + "\n")
    done = start
    try:
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            for data in reply.iter_content(_CHUNK):
                file.write(data)
                done += len(data)
                step.update(done, total)
    except OSError as error:
        import errno

        import requests

        if isinstance(error, requests.RequestException):
            raise
        if error.errno == errno.ENOSPC:
            raise NoSpaceError(f"the disk of {part.parent} filled up",
                               hint="free some space, or set QVM_CACHE_HOME") from error
        raise HostError(f"cannot write to {part}: {error.strerror}", hint="set QVM_CACHE_HOME") from error
    if total is not None and done < total:
        raise _TruncatedError(f"the connection ended after {done} of {total} bytes")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + _RESERVE:
        raise NoSpaceError(f"the download needs {format_size(needed)} in {folder}, and {format_size(free)} are free",
                           hint="free some space, or set QVM_CACHE_HOME to another disk")

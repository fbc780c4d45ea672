"""Where Debian packages come from: the mirror that the host's apt uses, or the one the user names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qvm.arch import Arch
from qvm.errors import HostError, ImageError
from qvm.progress import Progress

if TYPE_CHECKING:
    import requests

DEFAULT = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_TIMEOUT = 15.0


@dataclass(frozen=True, slots=True)
class Mirror:
    main: str
    security: str | None
    updates: bool = True
    """Whether the main archive's `<suite>-updates` is to be used."""


def parse_sources(texts: Iterable[str]) -> list[str]:
    """Every address in apt sources of either format (sources.list(5)), in order, without closing slashes."""
    found: list[str] = []
    for text in texts:
        for line in text.splitlines():
            words = re.sub(r"\[[^]]*\]", "", line).split()
            if len(words) > 2 and words[0] == "deb":
                found.append(words[1])
            elif words and words[0].lower() == "uris:":
                found.extend(words[1:])
    return [address.rstrip("/") for address in found]


def choose_mirror(addresses: Iterable[str], override: str | None) -> Mirror:
    """`override` (QVM_DEBIAN_MIRROR), else the first Debian archive among `addresses`, else deb.debian.org.

    The security archive lies beside the main one on every mirror of the usual layout.
    """
    if override:
        main = override.rstrip("/")
        return Mirror(main, f"{main}-security")
    known = [address for address in addresses if address.startswith(("http://", "https://"))]
    main = next((address for address in known if address.endswith("/debian")), DEFAULT)
    security = next((address for address in known if address.endswith("/debian-security")), f"{main}-security")
    return Mirror(main, security)


def host_sources() -> list[str]:
    """The texts of the host's apt sources; none on a host without apt."""
    folder = Path("/etc/apt")
    files = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    texts = []
    for path in files:
        if path.suffix in (".list", ".sources"):
            try:
                texts.append(path.read_text(errors="replace"))
            except OSError:
                continue  # a file that apt could not read either says nothing about mirrors
    return texts


def probe_mirror(suite: str, arch: Arch, components: Iterable[str], progress: Progress) -> Mirror:
    """The mirror to use, proven to answer for `suite`.

    Raises ImageError where it does not; what it has no complete updates of is built without them, and says so.
    """
    import requests

    with requests.Session() as session:
        mirror = choose_mirror(parse_sources(host_sources()), os.environ.get("QVM_DEBIAN_MIRROR"))
        try:
            _get(session, f"{mirror.main}/dists/{suite}/InRelease")
        except requests.RequestException as error:
            raise ImageError(
                f"the Debian mirror {mirror.main} does not answer for {suite}", details=str(error),
                hint="check the network and http_proxy, or name another mirror: "
                     "export QVM_DEBIAN_MIRROR=http://deb.debian.org/debian",
            ) from error  # fmt: skip

        def usable(address: str, what: str) -> bool:
            try:
                missing = _find_stale(session, address, [f"{part}/binary-{arch.debian}" for part in components])
            except requests.RequestException:
                problem = f"{address} does not answer"
            else:
                if missing is None:
                    return True
                problem = f"{address} is being synchronised ({missing} is not what its Release file says)"
            progress.note(f"{problem}: the image is built without {what}; build it again to have them")
            return False

        updates = usable(f"{mirror.main}/dists/{suite}-updates", "Debian's updates")
        security = mirror.security
        if security and not usable(f"{security}/dists/{suite}-security", "Debian's security updates"):
            security = None
        return Mirror(mirror.main, security, updates)


def _get(session: requests.Session, address: str) -> str:
    reply = session.get(address, timeout=_TIMEOUT)
    reply.raise_for_status()
    return reply.text


def _find_stale(session: requests.Session, address: str, folders: Iterable[str]) -> str | None:
    """The first package list that the mirror cannot give as its InRelease promises it; None where all are there.

    apt would end with "Mirror sync in progress?", for hours on some mirrors of the rarer architectures.
    """
    release = _get(session, f"{address}/InRelease")
    for folder in folders:
        path = f"{folder}/Packages.xz"
        promised = re.search(rf"^ ([0-9a-f]{{64}}) +(\d+) {re.escape(path)}$", release, re.MULTILINE)
        if promised is None:
            continue  # this archive has nothing for the component
        if session.head(f"{address}/{folder}/by-hash/SHA256/{promised[1]}", timeout=_TIMEOUT).ok:
            continue
        plain = session.head(f"{address}/{path}", timeout=_TIMEOUT)
        if not plain.ok or plain.headers.get("Content-Length") != promised[2]:
            return path
    return None


def render_sources(mirror: Mirror, suite: str, components: Iterable[str], *, check: bool = True) -> str:
    """sources.list for the image, each archive tied to Debian's keyring.

    Raises HostError where the host has no such keyring: without it nothing could be verified. `check`: whether it is
    this host that verifies.
    """
    if check and not KEYRING.is_file():
        raise HostError("Debian's archive keyring is missing on this host, so packages could not be verified",
                        hint="sudo apt install debian-archive-keyring")
    options, parts = f"[signed-by={KEYRING}]", " ".join(components)
    lines = [f"deb {options} {mirror.main} {suite} {parts}"]
    if mirror.updates:
        lines.append(f"deb {options} {mirror.main} {suite}-updates {parts}")
    if mirror.security:
        lines.append(f"deb {options} {mirror.security} {suite}-security {parts}")
    return "".join(line + "\n" for line in lines)

"""Where Debian packages come from: the mirror that the host's apt uses, or the one the user names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qvm.errors import HostError, ImageError
from qvm.progress import Progress

DEFAULT = "http://deb.debian.org/debian"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_TIMEOUT = 15.0


@dataclass(frozen=True, slots=True)
class Mirror:
    main: str
    security: str | None


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


def probe_mirror(suite: str, progress: Progress) -> Mirror:
    """The mirror to use, proven to answer for `suite`.

    Raises ImageError where it does not; a mirror without security updates is used without them, and says so.
    """
    import requests

    override = os.environ.get("QVM_DEBIAN_MIRROR")
    mirror = choose_mirror(parse_sources(host_sources()), override)

    def answers(address: str) -> str | None:
        try:
            reply = requests.get(address, timeout=_TIMEOUT, stream=True)
            reply.close()
        except requests.RequestException as error:
            return type(error).__name__ + f": {error}"
        return None if reply.status_code == 200 else f"HTTP {reply.status_code}"

    problem = answers(f"{mirror.main}/dists/{suite}/InRelease")
    if problem is not None:
        raise ImageError(
            f"the Debian mirror {mirror.main} does not answer for {suite}", details=problem,
            hint="check the network and http_proxy, or name another mirror: "
                 "export QVM_DEBIAN_MIRROR=http://deb.debian.org/debian",
        )  # fmt: skip
    if mirror.security and answers(f"{mirror.security}/dists/{suite}-security/InRelease") is not None:
        progress.note(f"{mirror.security} does not answer: the image is built without Debian's security updates")
        return Mirror(mirror.main, None)
    return mirror


def render_sources(mirror: Mirror, suite: str, components: Iterable[str], *, check: bool = True) -> str:
    """sources.list for the image, each archive tied to Debian's keyring.

    Raises HostError where the host has no such keyring: without it nothing could be verified. `check`: whether it is
    this host that verifies.
    """
    if check and not KEYRING.is_file():
        raise HostError("Debian's archive keyring is missing on this host, so packages could not be verified",
                        hint="sudo apt install debian-archive-keyring")
    options, parts = f"[signed-by={KEYRING}]", " ".join(components)
    lines = [f"deb {options} {mirror.main} {suite} {parts}", f"deb {options} {mirror.main} {suite}-updates {parts}"]
    if mirror.security:
        lines.append(f"deb {options} {mirror.security} {suite}-security {parts}")
    return "".join(line + "\n" for line in lines)

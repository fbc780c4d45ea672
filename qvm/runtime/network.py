"""What an instance reaches, and how: the host, proxies, registries, certificates. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

GATEWAY = "10.0.2.2"
"""Under this address QEMU's user network shows the guest the host's loopback (qemu(1), -netdev user)."""
NAMESERVER = "10.0.2.3"
GUEST_ADDRESS = "10.0.2.15"
HOST_NAMES = ("host.docker.internal", "gateway.docker.internal", "host.qvm.internal")
_LOOPBACK = ("localhost", "::1")


@dataclass(frozen=True, slots=True)
class Network:
    gateway: str = GATEWAY
    """The host, as the guest and its containers reach it; an address other than GATEWAY is made to lead there."""
    nameservers: tuple[str, ...] = (NAMESERVER,)
    search: tuple[str, ...] = ()
    """Domains in which short names are looked for."""
    wildcards: Mapping[str, str] = field(default_factory=dict)
    """Domain -> the address of all names below it."""
    domains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Domain -> its own name servers."""
    host_loopback: bool = True
    """Whether the gateway leads to services on the host's loopback."""
    proxies: Mapping[str, str] = field(default_factory=dict)
    """Variables of the environment, in both spellings."""
    mirrors: tuple[str, ...] = ()
    """Addresses that are asked for Docker Hub's images first."""
    insecure: tuple[str, ...] = ()
    """HOST[:PORT] of registries without TLS, or with a certificate that nobody vouches for."""
    authorities: tuple[bytes, ...] = ()
    """Certificates that the guest trusts, one in PEM form each."""
    registry_files: Mapping[str, bytes] = field(default_factory=dict)
    """Files of /etc/docker/certs.d by the path below it: `HOST:PORT/ca.crt`."""

    def is_split(self) -> bool:
        """Whether the guest's own questions need a name server that tells domains apart."""
        return bool(self.wildcards or self.domains)

    def registry_authorities(self) -> dict[str, list[str]]:
        """Registry -> paths in the guest of the certificates for it alone."""
        found: dict[str, list[str]] = {}
        for name in sorted(self.registry_files):
            host, _, leaf = name.partition("/")
            if leaf.endswith(".crt"):
                found.setdefault(host, []).append(f"/etc/docker/certs.d/{name}")
        return found


def proxy_variables(
    wanted: Mapping[str, str] | None, environ: Mapping[str, str], *, gateway: str = GATEWAY
) -> dict[str, str]:
    """The guest's proxy variables: `wanted` (http, https, all, no), else what the host's environment says.

    A proxy on the host's loopback is named by the gateway. The host itself is never reached through a proxy.
    """
    if wanted is None:
        wanted = {}
        for key in ("http", "https", "all", "no"):
            # Where both are set programs take the lower case one: an upper case HTTP_PROXY can come from a CGI request.
            value = environ.get(f"{key}_proxy") or environ.get(f"{key.upper()}_PROXY")
            if value:
                wanted[key] = value
    proxies = {key: rewrite_loopback(value, gateway) for key, value in wanted.items() if key != "no" and value}
    if not proxies:
        return {}
    ours = ("localhost", "127.0.0.0/8", "::1", gateway, *HOST_NAMES, ".qvm.internal")
    said = [word.strip() for word in wanted.get("no", "").split(",") if word.strip()]
    proxies["no"] = ",".join(dict.fromkeys([*said, *ours]))
    return {
        name: value for key, value in sorted(proxies.items()) for name in (f"{key}_proxy", f"{key.upper()}_PROXY")
    }


def rewrite_loopback(address: str, gateway: str) -> str:
    """A proxy's address as the guest reaches it: loopback is the gateway there; a missing scheme is http."""
    try:
        parts = urlsplit(address if "://" in address else f"http://{address}")
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return address
    if host not in _LOOPBACK and not host.startswith("127."):
        return address
    login = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
    place = f"{login}{gateway}{'' if port is None else f':{port}'}"
    return urlunsplit(parts._replace(netloc=place))


def split_certificates(text: bytes) -> list[bytes]:
    """The certificates of a PEM file, each by itself; other things in it are left out."""
    begin, end = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"
    found = []
    for part in text.split(begin)[1:]:
        body, mark, _ = part.partition(end)
        if mark:
            found.append(begin + body.replace(b"\r", b"") + end + b"\n")
    return found

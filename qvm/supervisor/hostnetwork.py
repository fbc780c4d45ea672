"""What a profile and the host say of proxies, registries and certificates, as the guest is to have it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from qvm.config.dns import is_address
from qvm.config.model import Config
from qvm.config.network import HOST_AUTHORITIES
from qvm.config.ports import PortForward, SocketPath
from qvm.log import get_logger
from qvm.process import run
from qvm.runtime.network import (
    GUEST_ADDRESS,
    HOST_NAMES,
    NAMESERVER,
    Network,
    proxy_variables,
    split_certificates,
)
from qvm.supervisor.hostresolver import reachable_server

log = get_logger(__name__)

SYSTEM_CERTIFICATES = Path("/etc/docker/certs.d")
_ADDED = (
    ("/usr/local/share/ca-certificates", "*.crt"),  # update-ca-certificates(8): Debian, Ubuntu, Alpine
    ("/etc/pki/ca-trust/source/anchors", "*"),  # update-ca-trust(8): Fedora and its like
    ("/etc/ca-certificates/trust-source/anchors", "*"),  # Arch
    ("/etc/pki/trust/anchors", "*"),  # SUSE
)
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
SUFFIX = "qvm.internal"
AGENT_SOCKET = "/run/host-services/ssh-auth.sock"
"""In the guest; where Docker Desktop has it, so that what is written for that works:
`docker run -v /run/host-services/ssh-auth.sock:/agent -e SSH_AUTH_SOCK=/agent`."""
_MOST = 1 << 20
"""Bytes of one certificate file; what is larger is none."""


def read_network(config: Config, environ: Mapping[str, str], *, system: Path = SYSTEM_CERTIFICATES) -> Network:
    """Reads the files of certificates; those that cannot be read now are left out, and the log says so."""
    return Network(
        gateway=config.gateway_address,
        nameservers=tuple(map(reachable_server, config.dns)) or (NAMESERVER,),
        wildcards={name.removeprefix("*."): target for name, target in config.dns_hosts.items()
                   if name.startswith("*.") and is_address(target)},
        domains={domain: tuple(map(reachable_server, servers.split(",")))
                 for domain, servers in config.dns_domains.items()},
        host_loopback=config.host_loopback,
        proxies=proxy_variables(config.proxies, environ) | {
            name: value for name, value in config.env.items() if name.lower() in _PROXY_VARIABLES
        },
        mirrors=config.registry_mirrors,
        insecure=config.insecure_registries,
        authorities=read_authorities(config.ca_certs),
        registry_files=_read_registry_files(system) | _read_registry_files(_docker_folder(environ) / "certs.d"),
    )


def profile_name(profile: str) -> str:
    return f"{profile}.{SUFFIX}"


def read_authorities(names: Sequence[str]) -> tuple[bytes, ...]:
    """The certificates of these files, each once; `HOST_AUTHORITIES` among them stands for the host's own."""
    texts = [text for name in names
             for text in (_read_host_authorities() if name == HOST_AUTHORITIES else [_read(Path(name))])]
    return tuple(dict.fromkeys(certificate for text in texts for certificate in split_certificates(text)))


def _read_host_authorities() -> list[bytes]:
    """What was added to those that the system came with."""
    if sys.platform == "darwin":
        done = run(["security", "find-certificate", "-a", "-p", "/Library/Keychains/System.keychain"], check=False)
        return [done.stdout]
    return [_read(path) for folder, pattern in _ADDED for path in sorted(Path(folder).rglob(pattern))]


def static_hosts(config: Config) -> dict[str, str]:
    """Name -> address, of what does not change while the machine runs."""
    own = {profile_name(config.profile): GUEST_ADDRESS}
    given = {name: target for name, target in config.dns_hosts.items() if "*" not in name and is_address(target)}
    return own | given | dict.fromkeys(HOST_NAMES, config.gateway_address)


def agent_variables(config: Config) -> dict[str, str]:
    return {"SSH_AUTH_SOCK": AGENT_SOCKET} if config.forward_agent else {}


def agent_rules(config: Config, environ: Mapping[str, str] = os.environ) -> tuple[PortForward, ...]:
    """The forward that brings the host's SSH agent into the guest."""
    path = environ.get("SSH_AUTH_SOCK", "")
    if not config.forward_agent or not path:
        return ()
    return (PortForward(SocketPath(AGENT_SOCKET), SocketPath(path), reverse=True),)


def _docker_folder(environ: Mapping[str, str]) -> Path:
    explicit = environ.get("DOCKER_CONFIG")
    return Path(explicit) if explicit else Path(environ.get("HOME") or Path.home()) / ".docker"


def _read_registry_files(folder: Path) -> dict[str, bytes]:
    """Docker's layout (docs.docker.com, "Use certificates for repository client verification"): HOST:PORT/NAME.crt,
    NAME.cert, NAME.key."""
    files = {}
    for suffix in ("crt", "cert", "key"):
        for path in sorted(folder.glob(f"*/*.{suffix}")):
            data = _read(path)
            if data and not any(letter.isspace() for letter in str(path.relative_to(folder))):
                files[str(path.relative_to(folder))] = data
    return files


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST + 1)
    except OSError as error:
        log.warning("%s is left out: %s", path, error.strerror)
        return b""
    return data if len(data) <= _MOST else b""

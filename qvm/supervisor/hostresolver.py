"""How the host itself resolves names: its search domains and name servers of single domains, as they are now."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qvm.runtime.network import GATEWAY, NAMESERVER

RESOLV_CONF = Path("/etc/resolv.conf")
NAMESERVER_IPV6 = "fec0::3"
"""QEMU's own on IPv6 (qemu(1), -netdev user, ipv6-dns)."""
_SCUTIL_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class HostResolver:
    nameservers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    domains: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Domain -> its own name servers; Linux hosts have a local server that tells domains apart, and none here."""

    def for_guest(self) -> tuple[str, ...]:
        """Whom the guest asks: QEMU, which asks the host's first server. It knows IPv4 and IPv6 ones apart."""
        known = [":" in server for server in self.nameservers]
        return (NAMESERVER_IPV6,) if known and all(known) else (NAMESERVER,)


def parse_resolv_conf(text: str) -> HostResolver:
    """resolv.conf(5): the last `search` or `domain` line holds. Pure."""
    servers: list[str] = []
    search: tuple[str, ...] = ()
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            servers.append(words[1].partition("%")[0])
        elif len(words) > 1 and words[0] in ("search", "domain"):
            search = tuple(_domains(words[1:]))
    return HostResolver(tuple(servers), search)


_BLOCK = re.compile(r"^resolver #\d+$", re.MULTILINE)
_VALUE = re.compile(r"^\s+(domain|search domain\[\d+\]|nameserver\[\d+\]|flags|options)\s*:\s*(.*?)\s*$", re.MULTILINE)


def parse_scutil(text: str) -> HostResolver:
    """`scutil --dns` of macOS: the first resolver without a domain is the default; those with one are for that domain
    (a VPN's). Resolvers for single interfaces, behind the second heading, and multicast DNS are left out. Pure."""
    head = text.partition("DNS configuration (for scoped queries)")[0]
    servers: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    domains: dict[str, tuple[str, ...]] = {}
    for number, block in enumerate(_BLOCK.split(head)[1:]):
        values = _VALUE.findall(block)
        found = tuple(value.partition("%")[0] for key, value in values if key.startswith("nameserver"))
        if any(key == "options" and "mdns" in value.split() for key, value in values):
            continue
        domain = next((value for key, value in values if key == "domain"), "")
        if number == 0:
            servers, search = found, tuple(_domains([value for key, value in values if key.startswith("search")]))
        elif domain and found:
            domains |= dict.fromkeys(_domains([domain]), found)
    return HostResolver(servers, search, domains)


def _domains(words: list[str]) -> list[str]:
    """Only what can stand in the guest's resolv.conf; the root and duplicates are left out."""
    plain = (word.strip(".").lower() for word in words)
    return list(dict.fromkeys(word for word in plain if re.fullmatch(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?", word)))


def read_resolver(path: Path = RESOLV_CONF) -> HostResolver:
    """As the host has it at this moment; empty where it cannot be told."""
    if sys.platform == "darwin":
        from qvm.errors import QvmError
        from qvm.process import run

        try:
            return parse_scutil(run(["scutil", "--dns"], timeout=_SCUTIL_TIMEOUT).text)
        except QvmError:
            return HostResolver()
    try:
        return parse_resolv_conf(path.read_text(errors="replace"))
    except OSError:
        return HostResolver()


def reachable_server(address: str) -> str:
    """A name server as the guest reaches it: 127.0.0.1 of the host is the gateway, another loopback address only by
    way of QEMU's own server, which asks it where it is the host's first."""
    if address in ("127.0.0.1", "::1"):
        return GATEWAY
    return NAMESERVER if address.startswith("127.") else address

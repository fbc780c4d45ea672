"""Settings of names: addresses that the user gives to names, and name servers of single domains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qvm.config.context import Context, Problem
from qvm.config.kinds import Variables

_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_MOST = 253
_GATEWAY, _NETWORK = "10.0.2.2", "10.0.2.0/24"
"""QEMU's user network (qemu(1), -netdev user)."""


@dataclass(frozen=True, slots=True)
class Domains(Variables):
    """A mapping of domain -> name server or list of them, or a list of DOMAIN=IP[,IP]."""

    def parse(self, raw: object, context: Context) -> dict[str, str]:
        if isinstance(raw, Mapping):
            raw = {key: ",".join(map(str, value)) if isinstance(value, list | tuple) else value
                   for key, value in raw.items()}
        return {domain.strip(".").lower(): ",".join(word.strip() for word in servers.split(","))
                for domain, servers in Variables.parse(self, raw, context).items()}

    def schema(self) -> dict[str, Any]:
        return {"type": "object",
                "additionalProperties": {"type": ["string", "array"], "items": {"type": "string"}}}


def is_name(text: str) -> bool:
    return len(text) <= _MOST and _NAME.fullmatch(text) is not None


def is_address(text: str) -> bool:
    import ipaddress

    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def validate_dns_hosts(value: Mapping[str, str], context: Context) -> list[Problem]:
    problems = []
    for name, target in value.items():
        if not is_name(name.removeprefix("*.")) or is_address(name):
            problems.append(Problem(f"{name!r} is not a name such as api.test or *.test", (name,)))
        if not is_address(target) and not is_name(target):
            problems.append(Problem(f"{target!r} is neither an IP address nor a name", (name,)))
    return problems


def validate_dns_domains(value: Mapping[str, str], context: Context) -> list[Problem]:
    problems = []
    for domain, servers in value.items():
        if not is_name(domain):
            problems.append(Problem(f"{domain!r} is not a domain such as corp.example", (domain,)))
        problems += [Problem(f"{server!r} is not an IP address", (domain,))
                     for server in servers.split(",") if not is_address(server)]
    return problems


def validate_gateway_address(value: str, context: Context) -> list[Problem]:
    import ipaddress

    try:
        found = ipaddress.IPv4Address(value)
    except ValueError:
        return [Problem(f"{value!r} is not an IPv4 address")]
    if value == _GATEWAY:
        return []
    if found.is_loopback or found.is_multicast or found.is_unspecified or found in ipaddress.IPv4Network(_NETWORK):
        return [Problem(f"{value} cannot be the host's address in the VM; take one that nothing else has there, "
                        "such as 192.168.5.2")]
    return []

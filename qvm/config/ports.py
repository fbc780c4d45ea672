"""Forward rules: how they are written, read and checked. Pure.

    [HOST_ADDRESS:]HOST_PORT:[GUEST_ADDRESS:]GUEST_PORT[/tcp|/udp|/any]     8080:80   0.0.0.0:53:53/udp
    HOST_PORTS:GUEST_PORTS                                                  8000-8010:9000-9010
    PORT                                                                    8080, the same as 8080:8080
    a socket's path instead of a port, on either side                       ~/db.sock:5432   2375:/run/docker.sock
    reverse:HOST:GUEST                                              who connects to GUEST in the VM reaches HOST
    ignore:[GUEST_ADDRESS:]GUEST_PORTS                                      is not forwarded

IPv6 addresses stand in brackets. A profile file may write a mapping instead: host, guest, protocol, reverse, ignore.
The first rule that a guest's listener matches decides; what none matches is forwarded to the same port of loopback.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from qvm.config.context import Context, Problem, RejectedError, reject
from qvm.config.kinds import Kind, Switch
from qvm.filenames import MAX_SOCKET_PATH

PROTOCOLS = ("tcp", "udp", "any")
GUEST_SSH_PORT = 22
LOOPBACK = "127.0.0.1"
_TOKEN = re.compile(
    r"\[(?P<six>[^\]]*)\]|(?P<four>\d+\.\d+\.\d+\.\d+|\*|localhost)|(?P<ports>\d+(?:-\d+)?)|(?P<path>(?:/|~/|\.\.?/)[^:]*)"
)
_SUFFIX = re.compile(r"/(tcp|udp|any)$")


@dataclass(frozen=True, slots=True)
class Ports:
    """One port or a range of them, both ends included."""

    first: int
    last: int
    address: str | None = None
    """None: on the host loopback, in the guest whatever is listened at."""

    def __str__(self) -> str:
        ports = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        if self.address is None:
            return ports
        return f"[{self.address}]:{ports}" if ":" in self.address else f"{self.address}:{ports}"


@dataclass(frozen=True, slots=True)
class SocketPath:
    """A unix socket, by its absolute path."""

    path: str

    def __str__(self) -> str:
        return self.path


Endpoint: TypeAlias = Ports | SocketPath


@dataclass(frozen=True, slots=True)
class PortForward:
    """One rule; `str` gives it as it can be typed."""

    guest: Endpoint
    host: Endpoint | None
    """None: do not forward."""
    protocol: str = "tcp"
    """tcp, udp or any."""
    reverse: bool = False
    """The guest's end is listened at, and leads to the host's."""

    def __str__(self) -> str:
        default = "any" if self.host is None else "tcp"
        suffix = "" if self.protocol == default else f"/{self.protocol}"
        if self.host is None:
            return f"ignore:{self.guest}{suffix}"
        return f"{'reverse:' if self.reverse else ''}{self.host}:{self.guest}{suffix}"


def parse_rule(text: str, context: Context | None = None) -> PortForward:
    """Read what was typed; relative paths need a `context`. RejectedError with the reason."""
    text = text.strip()
    kind, colon, rest = text.partition(":")
    word = kind if colon and kind in ("reverse", "ignore") else ""
    body = rest if word else text
    suffix = _SUFFIX.search(body)
    # `/run/tcp` alone would be a path; behind a port it is the protocol.
    protocol = suffix[1] if suffix and not _is_path(body[: suffix.start()].rpartition(":")[2]) else None
    if protocol is not None and suffix is not None:
        body = body[: suffix.start()]
    ends = _split(text, body)
    if word == "ignore":
        if len(ends) != 1:
            raise reject(f"{text!r} is not ignore:[ADDRESS:]PORT[-PORT]")
        return _check(PortForward(_guest(ends[0]), None, protocol or "any"))
    if len(ends) == 1 and not word and isinstance(ends[0], Ports) and ends[0].address is None:
        ends = [ends[0], ends[0]]
    if len(ends) != 2:
        raise reject(f"{text!r} is not HOST:GUEST, such as 8080:80, 127.0.0.1:8080:80 or ~/db.sock:5432")
    return _check(PortForward(_guest(ends[1]), _host(ends[0], context), protocol or "tcp", word == "reverse"))


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~/", "./", "../"))


def _split(text: str, body: str) -> list[Endpoint]:
    """The ends that a rule names, in order."""
    ends: list[Endpoint] = []
    address: str | None = None
    rest = body
    while rest:
        found = _TOKEN.match(rest)
        after = rest[found.end():] if found else ""
        if found is None or (after and not after.startswith(":")):
            raise reject(f"{text!r}: {rest!r} is neither a port, an address nor a path (IPv6 addresses stand in "
                         "brackets, paths begin with / or ~/)")
        rest = after[1:]
        if found["six"] is not None or found["four"] is not None:
            if address is not None:
                raise reject(f"{text!r}: a port must follow the address {address}")
            address = _address(found["six"] or found["four"] or "")
        elif found["ports"] is not None:
            ends.append(_ports(found["ports"], address))
            address = None
        elif address is not None:
            raise reject(f"{text!r}: a port must follow the address {address}")
        else:
            ends.append(SocketPath(found["path"]))
    if address is not None:
        raise reject(f"{text!r}: a port must follow the address {address}")
    return ends


def _address(text: str) -> str:
    if text == "*":
        return "0.0.0.0"
    if text == "localhost":
        return "127.0.0.1"
    import ipaddress

    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise reject(f"{text!r} is not an IP address") from None


def _ports(text: str, address: str | None) -> Ports:
    first, _, last = text.partition("-")
    low, high = int(first), int(last or first)
    if not 1 <= low <= 65535 or not 1 <= high <= 65535:
        raise reject(f"{text} is out of range; ports go from 1 to 65535")
    if high < low:
        raise reject(f"the range {text} ends before it begins")
    return Ports(low, high, address)


def _host(end: Endpoint, context: Context | None) -> Endpoint:
    if isinstance(end, Ports):
        return end
    path = end.path
    if path.startswith("~/") and context is not None:
        path = str(context.home()) + path[1:]
    if not path.startswith("/"):
        if context is None:
            raise reject(f"the path {path!r} must be absolute")
        path = str(context.cwd / path)
    path = os.path.normpath(path)
    if len(path.encode()) > MAX_SOCKET_PATH:
        raise reject(f"the socket path {path} is too long; the system allows {MAX_SOCKET_PATH} bytes")
    return SocketPath(path)


def _guest(end: Endpoint) -> Endpoint:
    if isinstance(end, SocketPath) and (not end.path.startswith("/") or ".." in PurePosixPath(end.path).parts):
        raise reject(f"the guest's socket {end.path!r} must be an absolute path")
    return end


def _check(rule: PortForward) -> PortForward:
    guest, host = rule.guest, rule.host
    if rule.protocol != "tcp" and not (isinstance(guest, Ports) and (host is None or isinstance(host, Ports))):
        raise reject(f"{rule}: a unix socket has no /{rule.protocol}")
    if rule.reverse and rule.protocol != "tcp":
        raise reject(f"{rule}: only TCP can be forwarded from the guest to the host")
    if isinstance(guest, Ports) and isinstance(host, Ports) and guest.last - guest.first != host.last - host.first:
        raise reject(f"{rule}: the two ranges differ in length")
    if isinstance(guest, Ports) and guest.first != guest.last and isinstance(host, SocketPath):
        raise reject(f"{rule}: a range of ports does not fit into one socket")
    if isinstance(host, Ports) and host.first != host.last and isinstance(guest, SocketPath):
        raise reject(f"{rule}: a range of ports does not lead to one socket")
    takes_ssh = isinstance(guest, Ports) and guest.first <= GUEST_SSH_PORT <= guest.last and rule.protocol != "udp"
    if takes_ssh and host is not None:
        raise reject(f"{rule}: port {GUEST_SSH_PORT} of the VM is reached by `--ssh-port`, not by a rule")
    return rule


@dataclass(frozen=True, slots=True)
class Forwards(Kind):
    """Rules as text or as mappings; `none` for none."""

    multiple = True

    def parse(self, raw: object, context: Context) -> tuple[PortForward, ...]:
        if isinstance(raw, Mapping):
            raise reject("must be a list of rules, not a mapping")
        items = list(raw) if isinstance(raw, list | tuple) else [raw]
        if [str(item).strip() for item in items] == ["none"]:
            return ()
        rules: list[PortForward] = []
        problems: list[Problem] = []
        for number, item in enumerate(items):
            try:
                rules.append(_parse_one(item, context))
            except RejectedError as error:
                problems += [Problem(problem.text, (number, *problem.path)) for problem in error.problems]
        if problems:
            raise RejectedError(*problems)
        return tuple(rules)

    def dump(self, value: tuple[PortForward, ...]) -> Any:
        return [str(rule) for rule in value] or "none"

    def restore(self, stored: Any) -> tuple[PortForward, ...]:
        return tuple(item if isinstance(item, PortForward) else parse_rule(item) for item in stored)

    def show(self, value: tuple[PortForward, ...]) -> str:
        return ", ".join(str(rule) for rule in value) or "none"

    def schema(self) -> dict[str, Any]:
        end = {"type": ["integer", "string"]}
        mapping = {
            "type": "object",
            "required": ["guest"],
            "additionalProperties": False,
            "properties": {
                "host": end, "guest": end, "protocol": {"enum": list(PROTOCOLS), "default": "tcp"},
                "reverse": {"type": "boolean", "default": False}, "ignore": {"type": "boolean", "default": False},
            },
        }  # fmt: skip
        items = {"anyOf": [{"type": ["integer", "string"]}, mapping]}
        return {"anyOf": [{"const": "none"}, {"type": "array", "items": items}]}


_KEYS = ("host", "guest", "protocol", "reverse", "ignore")


def _parse_one(item: object, context: Context) -> PortForward:
    if isinstance(item, PortForward):
        return item
    if isinstance(item, list | tuple):
        raise reject("must be one rule, not a list")
    if not isinstance(item, Mapping):
        return parse_rule(str(item), context)
    problems = [
        Problem(f"unknown key {key!r}; a rule has {', '.join(_KEYS)}", (str(key),)) for key in item if key not in _KEYS
    ]
    switches = {}
    for key in ("reverse", "ignore"):
        try:
            switches[key] = Switch().parse(item.get(key, "false"), context)
        except RejectedError as error:
            problems += [Problem(problem.text, (key,)) for problem in error.problems]
    protocol = str(item.get("protocol", "any" if switches.get("ignore") else "tcp")).strip()
    if protocol not in PROTOCOLS:
        problems.append(Problem(f"{protocol!r} is not one of {', '.join(PROTOCOLS)}", ("protocol",)))
    ends: dict[str, Endpoint] = {}
    for key in ("host", "guest"):
        if key in item:
            try:
                ends[key] = _one_end(item[key], context, host=key == "host")
            except RejectedError as error:
                problems += [Problem(problem.text, (key,)) for problem in error.problems]
        elif key == "guest" or not switches.get("ignore"):
            problems.append(Problem(f"a rule needs its {key}"))
    if switches.get("ignore") and ("host" in item or switches.get("reverse")):
        problems.append(Problem("a rule that ignores has no host and no reverse"))
    if problems:
        raise RejectedError(*problems)
    return _check(PortForward(ends["guest"], ends.get("host"), protocol, switches["reverse"]))


def _one_end(raw: object, context: Context, *, host: bool) -> Endpoint:
    text = str(raw).strip()
    ends = _split(text, text)
    if isinstance(raw, list | tuple | Mapping) or len(ends) != 1:
        raise reject(f"{text!r} is not [ADDRESS:]PORT[-PORT] or a socket's path")
    return _host(ends[0], context) if host else _guest(ends[0])


def find_earlier(rules: Sequence[PortForward], rule: PortForward) -> PortForward | None:
    """The rule before `rule` that takes all its listeners."""
    for other in rules:
        if other == rule:
            return None
        if rule.reverse or other.reverse or other.protocol not in (rule.protocol, "any"):
            continue
        a, b = other.guest, rule.guest
        if isinstance(a, Ports) and isinstance(b, Ports) and a.address in (None, b.address) and (
            a.first <= b.first and b.last <= a.last
        ):
            return other
    return None


def validate_rules(value: Sequence[PortForward], context: Context) -> list[Problem]:
    """What is wrong with rules that can be read."""
    problems = []
    for number, rule in enumerate(value):
        if isinstance(rule.host, SocketPath) and not rule.reverse and not Path(rule.host.path).parent.is_dir():
            problems.append(Problem(f"{rule}: the folder {Path(rule.host.path).parent} does not exist", (number,)))
        for other in value[:number]:
            if _overlap(rule, other):
                problems.append(Problem(f"{rule} and {other} want the same end on the host", (number,)))
    return problems


def _overlap(one: PortForward, two: PortForward) -> bool:
    """Whether both would have to listen at the same end: of the guest where both are reverse, else of the host."""
    if one.reverse != two.reverse or one.host is None or two.host is None:
        return False
    if one.protocol != two.protocol and "any" not in (one.protocol, two.protocol):
        return False
    a, b = (one.guest, two.guest) if one.reverse else (one.host, two.host)
    if isinstance(a, Ports) and isinstance(b, Ports):
        return a.first <= b.last and b.first <= a.last and (a.address or LOOPBACK) == (b.address or LOOPBACK)
    return a == b

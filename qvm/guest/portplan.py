"""Which of the guest's listeners appear where on the host, and on which way: rules in, a plan out. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qvm.config.ports import LOOPBACK, PortForward, Ports, SocketPath

GUEST_ADDRESS = "10.0.2.15"
"""What QEMU's user network gives its guest (-netdev user's `dhcpstart`)."""

EPHEMERAL = 32768
"""From here on ports are chosen by the kernel (net.ipv4.ip_local_port_range): a UDP socket there is some client's, and
forwarded only where a rule names it."""
_NOT_FOR_HOST = {"127.0.0.53", "127.0.0.54"}
"""systemd-resolved's stub resolvers: the guest's own business, and port 53 of the host is not theirs."""
_UDP_NOT_FOR_HOST = {67, 68, 123, 323, 546, 547, 5353, 5355}
"""DHCP, NTP, mDNS and LLMNR: about the guest's own network."""


class Listener(NamedTuple):
    protocol: str
    """tcp or udp."""
    address: str
    port: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """One forward as it should be."""

    protocol: str
    host: Ports | SocketPath
    """One port; without an address at both of the host's loopback addresses."""
    port: int
    """The guest's; 0 for a socket."""
    guest: str
    """The guest's end for people."""
    targets: tuple[str, ...]
    """Addresses to dial in the guest, best first, or the path of its socket."""
    user_network: bool = False
    """Whether QEMU's own forward can carry it."""
    rule: PortForward | None = None
    conflict: str | None = None
    """Why it must not be bound."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.protocol, self.guest if self.port == 0 else str(self.port), str(self.rule or "")

    def can_become(self, other: Wanted) -> bool:
        """Whether what is bound for this serves the other one too."""
        return (self.host, self.user_network, self.conflict) == (other.host, other.user_network, other.conflict)


def format_endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def dial_order(addresses: Iterable[str]) -> tuple[str, ...]:
    """Where in the guest to dial a port that is listened to at `addresses`, best first; () where nowhere.

    A wildcard is reached through loopback; `::` mostly takes IPv4 as well (net.ipv6.bindv6only), so both are tried.
    """
    ranked: dict[str, int] = {}
    for text in addresses:
        address = _read(text)
        if str(address) in _NOT_FOR_HOST or address.is_link_local:
            continue
        if address.is_unspecified and address.version == 6:
            targets = {LOOPBACK: 1, "::1": 2}
        elif address.is_unspecified:
            targets = {LOOPBACK: 0}
        else:
            targets = {str(address): 0 if str(address) == LOOPBACK else 2 if address.is_loopback else 3}
        for target, rank in targets.items():
            ranked[target] = min(rank, ranked.get(target, rank))
    return tuple(sorted(ranked, key=lambda target: (ranked[target], target)))


def plan(
    listeners: Iterable[Listener], rules: Sequence[PortForward], *, automatic: bool, user_network: Collection[str],
    ignore: Collection[int] = (),
) -> list[Wanted]:
    """Every forward that should be, those of rules first.

    `automatic`: whether what no rule names is forwarded too. `user_network`: protocols that shall go by QEMU's own
    forwards where the listener allows. `ignore`: TCP ports that never are. Two that want one end of the host: the later
    one has a `conflict`.
    """
    found: dict[tuple[int, str, int], list[str]] = {}
    for listener in listeners:
        if listener.protocol == "tcp" and (listener.port in ignore or any(_is_ours(rule, listener) for rule in rules)):
            continue
        number = next((n for n, rule in enumerate(rules) if _matches(rule, listener)), len(rules))
        if number < len(rules) and rules[number].host is None:
            continue
        if number == len(rules) and not (automatic and _is_of_interest(listener)):
            continue
        found.setdefault((number, listener.protocol, listener.port), []).append(listener.address)
    wishes = [(number, _of_socket(rule)) for number, rule in enumerate(rules) if _is_socket_rule(rule)]
    for (number, protocol, port), addresses in found.items():
        wanted = _of_listener(protocol, port, addresses, rules[number] if number < len(rules) else None, user_network)
        if wanted.targets:
            wishes.append((number, wanted))
    wishes.sort(key=lambda wish: (wish[0], wish[1].protocol, wish[1].port))
    return _settle_conflicts([wanted for _, wanted in wishes])


def _read(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(text.split("%", 1)[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _matches(rule: PortForward, listener: Listener) -> bool:
    guest = rule.guest
    if rule.reverse or not isinstance(guest, Ports) or rule.protocol not in (listener.protocol, "any"):
        return False
    if not guest.first <= listener.port <= guest.last:
        return False
    if guest.address is None:
        return True
    wanted, at = _read(guest.address), _read(listener.address)
    if wanted.is_unspecified:
        return at.is_unspecified
    return wanted == at or (at.is_unspecified and (at.version == wanted.version or at.version == 6))


def _is_ours(rule: PortForward, listener: Listener) -> bool:
    """Whether the agent listens there for a forward to the host."""
    guest = rule.guest
    return rule.reverse and isinstance(guest, Ports) and guest.first <= listener.port <= guest.last


def _is_of_interest(listener: Listener) -> bool:
    return listener.protocol == "tcp" or (listener.port < EPHEMERAL and listener.port not in _UDP_NOT_FOR_HOST)


def _is_socket_rule(rule: PortForward) -> bool:
    return isinstance(rule.guest, SocketPath) and rule.host is not None and not rule.reverse


def _of_socket(rule: PortForward) -> Wanted:
    """The guest's socket is dialled for each connection: it may come and go."""
    assert rule.host is not None
    return Wanted("tcp", rule.host, 0, str(rule.guest), (str(rule.guest),), rule=rule)


def _of_listener(
    protocol: str, port: int, addresses: list[str], rule: PortForward | None, user_network: Collection[str]
) -> Wanted:
    host: Ports | SocketPath = Ports(port, port)
    targets = dial_order(addresses)
    fixed = None
    if rule is not None and isinstance(rule.guest, Ports):
        assert rule.host is not None
        host = rule.host
        if isinstance(host, Ports):
            number = host.first + port - rule.guest.first
            host = Ports(number, number, host.address)
        if rule.guest.address is not None and not _read(rule.guest.address).is_unspecified:
            fixed = rule.guest.address
            targets = (fixed,)
    by_user_network = (
        protocol in user_network and isinstance(host, Ports) and (host.address is None or ":" not in host.address)
        and fixed is None and any(_is_open_to_network(address) for address in addresses)
    )  # fmt: skip
    return Wanted(protocol, host, port, format_endpoint(addresses[0], port), targets, by_user_network, rule)


def _is_open_to_network(text: str) -> bool:
    address = _read(text)
    return address.is_unspecified or str(address) == GUEST_ADDRESS


def _host_end(wanted: Wanted) -> tuple[str, str]:
    if isinstance(wanted.host, SocketPath):
        return "unix", wanted.host.path
    return wanted.protocol, format_endpoint(wanted.host.address or LOOPBACK, wanted.host.first)


def _settle_conflicts(wishes: list[Wanted]) -> list[Wanted]:
    taken: dict[tuple[str, str], Wanted] = {}
    settled = []
    for wanted in wishes:
        end = _host_end(wanted)
        first = taken.setdefault(end, wanted)
        if first is not wanted:
            wanted = Wanted(wanted.protocol, wanted.host, wanted.port, wanted.guest, wanted.targets, False, wanted.rule,
                            f"it leads to {first.guest} of this VM already")
        settled.append(wanted)
    return settled

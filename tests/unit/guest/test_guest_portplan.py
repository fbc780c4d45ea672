"""The plan of forwards: which rule a listener falls under, where it appears, on which way. Golden texts."""

from __future__ import annotations

import pytest

from qvm.config.ports import parse_rule
from qvm.guest.portplan import Listener, Wanted, plan


def show(wanted: Wanted) -> str:
    way = "user-network" if wanted.user_network else "tunnel"
    said = f" ({wanted.conflict})" if wanted.conflict else ""
    return f"{wanted.protocol} {wanted.host} <- {wanted.guest} [{' '.join(wanted.targets)}] {way}{said}"


def planned(
    listeners: str, *rules: str, automatic: bool = True, user: tuple[str, ...] = ("udp",)
) -> list[str]:
    heard = []
    for text in listeners.split():
        protocol, _, rest = text.partition("/")
        address, _, port = rest.rpartition(":")
        heard.append(Listener(protocol, address.strip("[]"), int(port)))
    return [show(wanted) for wanted in plan(heard, [parse_rule(rule) for rule in rules], automatic=automatic,
                                            user_network=user, ignore=(22,))]


@pytest.mark.parametrize(
    ("listeners", "rules", "wanted"),
    [
        # Without a rule: the same port of loopback.
        ("tcp/0.0.0.0:80 tcp/127.0.0.1:81 tcp/[::]:82 tcp/[::1]:83", (),
         ["tcp 80 <- 0.0.0.0:80 [127.0.0.1] tunnel", "tcp 81 <- 127.0.0.1:81 [127.0.0.1] tunnel",
          "tcp 82 <- [::]:82 [127.0.0.1 ::1] tunnel", "tcp 83 <- [::1]:83 [::1] tunnel"]),
        ("tcp/0.0.0.0:22 tcp/127.0.0.53:53 tcp/[fe80::1%eth0]:99", (), []),
        # UDP: by the user network where it can; not what is a client's, nor the guest's own network's.
        ("udp/0.0.0.0:53 udp/127.0.0.1:54 udp/10.0.2.15:55 udp/[::1]:56", (),
         ["udp 53 <- 0.0.0.0:53 [127.0.0.1] user-network", "udp 54 <- 127.0.0.1:54 [127.0.0.1] tunnel",
          "udp 55 <- 10.0.2.15:55 [10.0.2.15] user-network", "udp 56 <- [::1]:56 [::1] tunnel"]),
        ("udp/0.0.0.0:40000 udp/0.0.0.0:68 udp/0.0.0.0:5353", (), []),
        ("udp/0.0.0.0:40000", ("40000/udp",), ["udp 40000 <- 0.0.0.0:40000 [127.0.0.1] user-network"]),
        # The first rule that matches decides.
        ("tcp/0.0.0.0:80", ("8080:80", "9090:80"), ["tcp 8080 <- 0.0.0.0:80 [127.0.0.1] tunnel"]),
        ("tcp/0.0.0.0:80", ("ignore:80", "9090:80"), []),
        ("tcp/0.0.0.0:80", ("9090:80", "ignore:80"), ["tcp 9090 <- 0.0.0.0:80 [127.0.0.1] tunnel"]),
        ("tcp/0.0.0.0:80 udp/0.0.0.0:80", ("ignore:80/udp",), ["tcp 80 <- 0.0.0.0:80 [127.0.0.1] tunnel"]),
        ("tcp/0.0.0.0:80 udp/0.0.0.0:80", ("8080:80/any",),
         ["tcp 8080 <- 0.0.0.0:80 [127.0.0.1] tunnel", "udp 8080 <- 0.0.0.0:80 [127.0.0.1] user-network"]),
        # Ranges keep their order.
        ("tcp/0.0.0.0:9000 tcp/0.0.0.0:9010 tcp/0.0.0.0:9011", ("8000-8010:9000-9010",),
         ["tcp 8000 <- 0.0.0.0:9000 [127.0.0.1] tunnel", "tcp 8010 <- 0.0.0.0:9010 [127.0.0.1] tunnel",
          "tcp 9011 <- 0.0.0.0:9011 [127.0.0.1] tunnel"]),
        # Addresses in the guest: a wildcard listens at all of them, a rule for the wildcard wants no other.
        ("tcp/127.0.0.1:80", ("8080:127.0.0.1:80",), ["tcp 8080 <- 127.0.0.1:80 [127.0.0.1] tunnel"]),
        ("tcp/0.0.0.0:80", ("8080:127.0.0.1:80",), ["tcp 8080 <- 0.0.0.0:80 [127.0.0.1] tunnel"]),
        ("tcp/127.0.0.1:80", ("8080:0.0.0.0:80",), ["tcp 80 <- 127.0.0.1:80 [127.0.0.1] tunnel"]),
        ("tcp/172.17.0.1:80", ("8080:127.0.0.1:80",), ["tcp 80 <- 172.17.0.1:80 [172.17.0.1] tunnel"]),
        ("tcp/[::]:80", ("8080:[::1]:80",), ["tcp 8080 <- [::]:80 [::1] tunnel"]),
        # Addresses of the host.
        ("tcp/0.0.0.0:80", ("0.0.0.0:80:80",), ["tcp 0.0.0.0:80 <- 0.0.0.0:80 [127.0.0.1] tunnel"]),
        ("udp/0.0.0.0:80", ("[::1]:80:80/udp",), ["udp [::1]:80 <- 0.0.0.0:80 [127.0.0.1] tunnel"]),
        # Sockets on either side; those of the guest need no listener.
        ("tcp/0.0.0.0:80", ("/tmp/a.sock:80",), ["tcp /tmp/a.sock <- 0.0.0.0:80 [127.0.0.1] tunnel"]),
        ("", ("2375:/run/docker.sock",), ["tcp 2375 <- /run/docker.sock [/run/docker.sock] tunnel"]),
        ("", ("/tmp/a.sock:/run/docker.sock", "reverse:80:80", "8080:80"),
         ["tcp /tmp/a.sock <- /run/docker.sock [/run/docker.sock] tunnel"]),
        ("tcp/127.0.0.1:80 tcp/127.0.0.1:81", ("reverse:80:80",), ["tcp 81 <- 127.0.0.1:81 [127.0.0.1] tunnel"]),
        # Two that want one end: the rule, or the first.
        ("tcp/0.0.0.0:80 tcp/0.0.0.0:8080", ("8080:80",),
         ["tcp 8080 <- 0.0.0.0:80 [127.0.0.1] tunnel",
          "tcp 8080 <- 0.0.0.0:8080 [127.0.0.1] tunnel (it leads to 0.0.0.0:80 of this VM already)"]),
        # Port 22 of TCP never.
        ("tcp/0.0.0.0:22 udp/0.0.0.0:22", (), ["udp 22 <- 0.0.0.0:22 [127.0.0.1] user-network"]),
    ],
)  # fmt: skip
def test_golden_plans(listeners: str, rules: tuple[str, ...], wanted: list[str]) -> None:
    assert planned(listeners, *rules) == wanted


def test_the_user_network_takes_tcp_where_that_is_wished() -> None:
    heard = "tcp/0.0.0.0:80 tcp/127.0.0.1:81 tcp/[::]:82 tcp/10.0.2.15:83 tcp/172.17.0.1:84"
    ways = [text.rpartition(" ")[2] for text in planned(heard, user=("tcp", "udp"))]
    assert ways == ["user-network", "tunnel", "user-network", "user-network", "tunnel"]


def test_without_automatic_forwards_only_rules_count() -> None:
    assert planned("tcp/0.0.0.0:80 tcp/0.0.0.0:81", "8080:80", automatic=False) == [
        "tcp 8080 <- 0.0.0.0:80 [127.0.0.1] tunnel"]

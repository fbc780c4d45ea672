"""How the host's own resolver is read, on Linux and macOS."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvm.supervisor.hostresolver import HostResolver, parse_resolv_conf, parse_scutil, reachable_server, read_resolver

# `scutil --dns` on a Mac whose VPN is up: its domain has servers of its own.
SCUTIL = """DNS configuration

resolver #1
  search domain[0] : home.example
  search domain[1] : Lab.example
  nameserver[0] : 192.168.1.1
  nameserver[1] : fe80::1%en0
  if_index : 6 (en0)
  flags    : Request A records
  reach    : 0x00020002 (Reachable,Directly Reachable Address)

resolver #2
  domain   : corp.example
  nameserver[0] : 10.9.9.9
  nameserver[1] : 10.9.9.8
  flags    : Supplemental, Request A records
  reach    : 0x00000003 (Reachable,Transient Connection)
  order    : 100800

resolver #3
  domain   : local
  options  : mdns
  timeout  : 5
  flags    : Request A records
  reach    : 0x00000000 (Not Reachable)
  order    : 300000

resolver #4
  domain   : 254.169.in-addr.arpa
  options  : mdns
  nameserver[0] : 1.2.3.4
  timeout  : 5

DNS configuration (for scoped queries)

resolver #1
  search domain[0] : scoped.example
  nameserver[0] : 192.168.77.1
  if_index : 6 (en0)
  flags    : Scoped, Request A records
"""


def test_scutil_gives_servers_search_domains_and_those_of_a_vpn() -> None:
    assert parse_scutil(SCUTIL) == HostResolver(
        ("192.168.1.1", "fe80::1"), ("home.example", "lab.example"), {"corp.example": ("10.9.9.9", "10.9.9.8")})


@pytest.mark.parametrize("text", ["", "No DNS configuration available\n", "resolver #1\n  flags : x\n"])
def test_scutil_without_a_network_gives_nothing(text: str) -> None:
    assert parse_scutil(text) == HostResolver()


@pytest.mark.parametrize(("text", "found"), [
    ("", HostResolver()),
    ("# c\nnameserver 1.1.1.1\nsearch a.example  B.example. .\noptions edns0\n",
     HostResolver(("1.1.1.1",), ("a.example", "b.example"))),
    ("search a.example\ndomain c.example\nnameserver fe80::1%eth0\n", HostResolver(("fe80::1",), ("c.example",))),
    ("search a$b.example good.example good.example\n", HostResolver((), ("good.example",))),
])
def test_resolv_conf_is_read_as_the_c_library_does(text: str, found: HostResolver) -> None:
    assert parse_resolv_conf(text) == found


def test_the_guest_asks_qemu_over_the_protocol_that_the_hosts_server_has() -> None:
    assert HostResolver(("fd00::1", "fd00::2")).for_guest() == ("fec0::3",)
    assert HostResolver(("fd00::1", "1.1.1.1")).for_guest() == HostResolver().for_guest() == ("10.0.2.3",)


@pytest.mark.parametrize(("server", "guest"), [
    ("127.0.0.1", "10.0.2.2"), ("::1", "10.0.2.2"), ("127.0.0.53", "10.0.2.3"), ("10.1.1.1", "10.1.1.1"),
])
def test_servers_on_the_hosts_loopback_are_reached_by_the_gateway(server: str, guest: str) -> None:
    assert reachable_server(server) == guest


def test_a_missing_file_is_no_resolver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert read_resolver(tmp_path / "none") == HostResolver()
    (tmp_path / "r").write_text("nameserver 9.9.9.9\n")
    assert read_resolver(tmp_path / "r").nameservers == ("9.9.9.9",)

"""Names and name servers of domains, as flags and files give them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvm.config.context import Context
from qvm.config.dns import Domains, validate_dns_domains, validate_dns_hosts, validate_gateway_address

CONTEXT = Context("dev", Path("/"), {})


@pytest.mark.parametrize("raw", [
    ["Corp.example.=10.1.1.1, 10.1.1.2"], {"corp.example": ["10.1.1.1", "10.1.1.2"]},
    {"corp.example": "10.1.1.1,10.1.1.2"},
])
def test_domains_are_written_in_several_ways(raw: object) -> None:
    assert Domains().parse(raw, CONTEXT) == {"corp.example": "10.1.1.1,10.1.1.2"}


@pytest.mark.parametrize(("name", "target", "good"), [
    ("api.test", "10.1.1.1", True), ("*.test", "fd00::1", True), ("api.test", "host.qvm.internal", True),
    ("my_db", "10.0.0.1", True), ("a b", "10.1.1.1", False), ("*", "10.1.1.1", False), ("a.*.test", "1.1.1.1", False),
    ("api.test", "10.1.1.1;reboot", False), ("10.1.1.1", "10.1.1.2", False), ("x" * 64, "10.1.1.1", False),
])
def test_hosts_are_names_with_an_address_or_another_name(name: str, target: str, good: bool) -> None:
    assert (not validate_dns_hosts({name: target}, CONTEXT)) is good


def test_every_bad_domain_and_server_is_reported() -> None:
    assert validate_dns_domains({"corp.example": "10.1.1.1,fd00::1"}, CONTEXT) == []
    problems = validate_dns_domains({"a/b": "1.1.1.1,dns.example", "ok": ""}, CONTEXT)
    assert [problem.path for problem in problems] == [("a/b",), ("a/b",), ("ok",)]


@pytest.mark.parametrize(("address", "good"), [
    ("10.0.2.2", True), ("192.168.5.2", True), ("10.0.2.9", False), ("127.0.0.1", False), ("fd00::1", False),
    ("224.0.0.1", False), ("host", False), ("1.2.3.4;x", False),
])
def test_the_hosts_address_is_one_that_is_free_in_the_guest(address: str, good: bool) -> None:
    assert (not validate_gateway_address(address, CONTEXT)) is good

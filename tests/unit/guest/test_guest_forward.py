from __future__ import annotations

import errno
import sys

import pytest

from qvm.guest.bind import explain_refusal
from qvm.guest.portplan import dial_order, format_endpoint


@pytest.mark.parametrize(
    ("addresses", "targets"),
    [
        (["0.0.0.0"], ("127.0.0.1",)),
        (["127.0.0.1"], ("127.0.0.1",)),
        (["::"], ("127.0.0.1", "::1")),
        (["0.0.0.0", "::"], ("127.0.0.1", "::1")),
        (["::1"], ("::1",)),
        (["::1", "127.0.0.1"], ("127.0.0.1", "::1")),
        (["::ffff:127.0.0.1"], ("127.0.0.1",)),
        (["::ffff:0.0.0.0"], ("127.0.0.1",)),
        (["10.0.2.15"], ("10.0.2.15",)),
        (["172.17.0.1", "127.0.0.1"], ("127.0.0.1", "172.17.0.1")),
        (["127.0.0.2"], ("127.0.0.2",)),
        (["127.0.0.53", "127.0.0.54"], ()),
        (["127.0.0.53", "0.0.0.0"], ("127.0.0.1",)),
        (["fe80::1%eth0"], ()),
        ([], ()),
    ],
)
def test_where_a_port_is_dialled(addresses: list[str], targets: tuple[str, ...]) -> None:
    assert dial_order(addresses) == targets


def test_a_taken_port() -> None:
    state, reason = explain_refusal(OSError(errno.EADDRINUSE, "Address already in use"), 8080)
    assert state == "taken" and "8080" in reason


@pytest.mark.skipif(sys.platform != "linux", reason="the hint names a setting of Linux")
def test_a_privileged_port_says_what_is_needed() -> None:
    state, reason = explain_refusal(OSError(errno.EACCES, "Permission denied"), 80)
    assert state == "denied" and "`sudo sysctl net.ipv4.ip_unprivileged_port_start=80`" in reason


def test_any_other_refusal_keeps_the_systems_words() -> None:
    assert explain_refusal(OSError(errno.ENOBUFS, "Cannot assign"), 80) == (
        "failed", "port 80 cannot be bound: Cannot assign"
    )


def test_endpoints() -> None:
    assert format_endpoint("::1", 80) == "[::1]:80"
    assert format_endpoint("127.0.0.1", 80) == "127.0.0.1:80"

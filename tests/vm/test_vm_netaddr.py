"""Two VMs in the network that they share. About 60 s, two VMs without a runtime."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import User, clear, make_user, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1800)]

MIB = int(os.environ.get("QVM_TEST_TRANSFER", 8))
"""Sent from one VM to the other."""

RECEIVE = """
import hashlib, socket
server = socket.create_server(("::", 9700), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    peer, _ = server.accept()
    digest = hashlib.sha256()
    while data := peer.recv(1 << 20): digest.update(data)
    peer.sendall(digest.hexdigest().encode())
    peer.close()
"""
SEND = f"""
import socket, sys
with socket.create_connection((sys.argv[1], 9700), timeout=120) as peer:
    for _ in range({MIB}): peer.sendall(bytes(range(256)) * 4096)
    peer.shutdown(socket.SHUT_WR)
    print(peer.makefile().read())
"""


@pytest.fixture(scope="module")
def pair(cache_home: Path) -> Iterator[User]:
    """`a` and `b` run."""
    user = make_user(cache_home)
    for profile in "ab":
        user.qvm("start", profile, "--runtime", "none", "--mount", "none", "--network-address", timeout=1500)
    yield user
    clear(user)


def ping(user: User, profile: str, target: str) -> bool:
    line = f"ping -c 1 -W 5 {target}"
    return user.qvm("ssh", profile, "--", line, check=False).returncode == 0


def test_they_reach_each_other_by_name_and_address_over_both_protocols(pair: User) -> None:
    network = {profile: pair.status(profile)["network"] for profile in "ab"}
    assert (network["a"]["address"], network["b"]["address"]) == ("10.71.86.2", "10.71.86.3")
    wait_for(lambda: ping(pair, "a", "b.qvm.internal"), 15, "a knows b, which was started later")
    assert ping(pair, "b", "a.qvm.internal") and ping(pair, "b", network["a"]["address6"])
    assert pair.qvm("ssh", "a", "--", "getent hosts a.qvm.internal b.qvm.internal").stdout.split() == [
        "10.71.86.2", "a.qvm.internal", "10.71.86.3", "b.qvm.internal"]
    routes = pair.qvm("ssh", "a", "--", "ip -6 route; ip -6 address show dev eth0").stdout
    assert "default via fe80::2" in routes and "fec0::" in routes, "IPv6 by the host too"


def test_what_is_sent_arrives_as_it_was(pair: User) -> None:
    pair.qvm("ssh", "b", "--", "sudo", "systemd-run", "--unit=receive", "python3", "-c", RECEIVE)
    wait_for(lambda: pair.qvm("ssh", "b", "--", "ss -ltn | grep -q 9700", check=False).returncode == 0, 30, "b listens")
    wanted = hashlib.sha256(bytes(range(256)) * 4096 * MIB).hexdigest()
    for target in ("b.qvm.internal", "fd71:766d:1::3"):
        said = pair.qvm("ssh", "a", "--", "python3", "-c", SEND, target).stdout.strip()
        assert said == wanted


def test_the_host_has_no_listener_for_it(pair: User) -> None:
    sockets = sorted(path.name for path in (pair.home / "q" / "_net").iterdir())
    assert sockets == ["2.q", "2.s", "3.q", "3.s"]
    assert (pair.home / "q" / "_net").stat().st_mode & 0o777 == 0o700


def test_it_is_back_after_the_supervisor_was_killed_and_after_suspend_and_resume(pair: User) -> None:
    os.kill(pair.status("b")["supervisor_pid"], signal.SIGKILL)
    pair.qvm("start", "b")
    assert ping(pair, "a", "b.qvm.internal") and ping(pair, "b", "a.qvm.internal")
    pair.qvm("suspend", "b")
    assert not ping(pair, "a", "10.71.86.3")
    pair.qvm("start", "b")
    wait_for(lambda: ping(pair, "a", "b.qvm.internal"), 15, "the name")
    pair.qvm("snapshot", "create", "one", "-p", "b")
    assert ping(pair, "a", "b.qvm.internal") and ping(pair, "b", "a.qvm.internal"), "while it runs on"


def test_an_instance_that_goes_leaves_its_address_and_no_name(pair: User) -> None:
    pair.qvm("delete", "b", "-f", "--data")
    wait_for(lambda: pair.qvm("ssh", "a", "--", "getent hosts b.qvm.internal", check=False).returncode != 0, 15,
             "the name to go")
    assert not (pair.home / "q" / "_net" / "3.q").exists()

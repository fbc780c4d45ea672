"""Forwards of one real guest: every kind, load, and coming back. `-s` shows how long what took. Full counts, as in
test_forward_load.py: QVM_TEST_CONNECTIONS=10000 QVM_TEST_AT_ONCE=500 QVM_TEST_TRANSFER=2048 QVM_TEST_RESTARTS=100."""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import User, clear, make_user, wait_for

import qvm

pytestmark = [pytest.mark.vm, pytest.mark.timeout(3600)]

CONNECTIONS = int(os.environ.get("QVM_TEST_CONNECTIONS", 200))
AT_ONCE = int(os.environ.get("QVM_TEST_AT_ONCE", 100))
TRANSFER = int(os.environ.get("QVM_TEST_TRANSFER", 16))
RESTARTS = int(os.environ.get("QVM_TEST_RESTARTS", 5))
BACK_WITHIN = 10.0
"""Seconds; as specified for a quiet machine."""
BLOCK = bytes(range(256)) * 4096

SERVER = """
import hashlib, os, socket, sys, threading
BLOCK = bytes(range(256)) * 4096
def answer(peer):
    with peer:
        head = peer.recv(1)
        if head == b"b": peer.sendall(b"bye")
        elif head == b"r":
            digest = hashlib.sha256()
            while data := peer.recv(1 << 20): digest.update(data)
            peer.sendall(digest.digest())
        elif head == b"s":
            for _ in range(int(peer.makefile("rb").readline())): peer.sendall(BLOCK)
def safely(peer):
    try: answer(peer)
    except OSError: return
def serve(listener):
    while True: threading.Thread(target=safely, args=(listener.accept()[0],), daemon=True).start()
def upper(sock):
    while True:
        data, sender = sock.recvfrom(65535)
        sock.sendto(data.upper(), sender)
def start(work, sock): threading.Thread(target=work, args=(sock,)).start()
for host, port in (("0.0.0.0", 9601), ("127.0.0.1", 9602), ("::1", 9603), ("0.0.0.0", 9604), ("0.0.0.0", 9605)):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    start(serve, socket.create_server((host, port), family=family, backlog=1024))
for host, port in (("0.0.0.0", 9611), ("127.0.0.1", 9612)):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, port))
    start(upper, sock)
sock = socket.socket(socket.AF_UNIX)
sock.bind("/run/in-guest.sock")
sock.listen(100)
start(serve, sock)
"""
TOGGLE = """
import socket, threading
def serve(listener):
    while True:
        try: peer, _ = listener.accept()
        except OSError: return
        peer.recv(1); peer.sendall(b"bye"); peer.close()
listener = None
with socket.create_server(("127.0.0.1", 9621)) as control:
    while True:
        peer, _ = control.accept()
        if listener is None:
            listener = socket.create_server(("0.0.0.0", 9620))
            threading.Thread(target=serve, args=(listener,)).start()
        else:
            listener.shutdown(socket.SHUT_RDWR); listener.close(); listener = None
        peer.recv(1); peer.sendall(b"bye"); peer.close()
"""


@pytest.fixture(scope="module")
def before() -> set[tuple[str, int]]:
    return host_listeners()


@pytest.fixture(scope="module")
def guest(before: set[tuple[str, int]], cache_home: Path) -> Iterator[User]:
    """A VM named `net` whose services are up; a service of the host listens at port 9640."""
    user = make_user(cache_home)
    host_service = socket.create_server(("127.0.0.1", 9640))
    threading.Thread(target=serve_bye, args=(host_service,), daemon=True).start()
    rules = ["19604:9604", f"{user.home}/h.sock:9605", "9630:/run/in-guest.sock", "reverse:9640:9641",
             "reverse:9640:/tmp/to-host.sock"]
    user.qvm("start", "net", "--runtime", "none", "--mount", "none", *(f"--publish={rule}" for rule in rules),
             timeout=1500)
    user.qvm("ssh", "net", "--", "sudo", "systemd-run", "--unit=server", "python3", "-c", SERVER)
    yield user
    clear(user)
    host_service.close()


def serve_bye(server: socket.socket) -> None:
    while True:
        try:
            peer, _ = server.accept()
        except OSError:
            return
        with peer:
            peer.sendall(b"bye")


def host_listeners() -> set[tuple[str, int]]:
    """What is bound on this host: TCP listeners and UDP sockets."""
    return {(entry.laddr.ip, entry.laddr.port) for entry in psutil.net_connections("inet")
            if entry.laddr and (entry.status == psutil.CONN_LISTEN or entry.type == socket.SOCK_DGRAM)}


def ask(address: tuple[str, int] | str) -> bytes:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as peer:
        peer.settimeout(60)
        peer.connect(address)
        peer.sendall(b"b")
        said = b""
        while data := peer.recv(16):
            said += data
        return said


def ask_udp(host: str, port: int) -> bytes:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1)
        sock.sendto(b"hello", (host, port))
        return sock.recv(100)


def reaches(work: Callable[[], bytes], wanted: bytes) -> bool:
    try:
        return work() == wanted
    except OSError:
        return False


def failing(user: User) -> list[str]:
    """Which of all the ways does not work."""
    ways: dict[str, tuple[Callable[[], bytes], bytes]] = {
        "wildcard": (lambda: ask(("127.0.0.1", 9601)), b"bye"),
        "wildcard, IPv6 at the host": (lambda: ask(("::1", 9601)), b"bye"),
        "loopback": (lambda: ask(("127.0.0.1", 9602)), b"bye"),
        "IPv6 loopback in the guest": (lambda: ask(("127.0.0.1", 9603)), b"bye"),
        "another port by a rule": (lambda: ask(("127.0.0.1", 19604)), b"bye"),
        "a host socket": (lambda: ask(f"{user.home}/h.sock"), b"bye"),
        "a guest socket": (lambda: ask(("127.0.0.1", 9630)), b"bye"),
        "UDP by the user network": (lambda: ask_udp("127.0.0.1", 9611), b"HELLO"),
        "UDP by the user network, IPv6": (lambda: ask_udp("::1", 9611), b"HELLO"),
        "UDP of the guest's loopback": (lambda: ask_udp("127.0.0.1", 9612), b"HELLO"),
    }  # fmt: skip
    return [name for name, (work, wanted) in ways.items() if not reaches(work, wanted)]


def wait_all(user: User, seconds: float, what: str) -> float:
    began = time.monotonic()
    while (missing := failing(user)) and time.monotonic() - began < seconds + 60:
        time.sleep(0.05)
    taken = time.monotonic() - began
    assert not missing and taken < seconds, f"{what}: {missing or 'all back'} after {taken:.1f} s"
    return taken


def supervisor_of(user: User) -> int:
    return int(user.status("net")["supervisor_pid"])


def test_every_kind_of_forward(guest: User) -> None:
    wait_all(guest, 20, "first")
    script = ("import socket as s\n"
              "for family, at in ((s.AF_INET, ('127.0.0.1', 9641)), (s.AF_UNIX, '/tmp/to-host.sock')):\n"
              "    peer = s.socket(family); peer.connect(at); peer.sendall(b'b'); print(peer.recv(16))")
    assert guest.qvm("ssh", "net", "--", "python3", "-c", script).stdout.split() == ["b'bye'"] * 2
    status = guest.status("net")
    found = {(entry["guest"], entry["path"]): entry for entry in status["forwards"]}
    assert found["0.0.0.0:9611", "user-network"]["protocol"] == "udp"
    assert found["127.0.0.1:9612", "tunnel"]["protocol"] == "udp"
    assert found["0.0.0.0:9604", "tunnel"]["host"] == "127.0.0.1:19604"
    assert {event["event"] for event in status["forward_events"]} >= {"forwarding"}
    assert not reaches(lambda: ask(("127.0.0.1", 9604)), b"bye"), "a rule takes the port elsewhere"
    assert "forwarding tcp 0.0.0.0:9604 <- 127.0.0.1:19604" in guest.qvm("logs", "net", "supervisor").stdout
    socket_mode = (guest.home / "h.sock").stat().st_mode & 0o777
    assert socket_mode == 0o600


def test_nothing_is_bound_beyond_loopback(guest: User, before: set[tuple[str, int]]) -> None:
    new = {entry for entry in host_listeners() - before if entry[0] not in ("127.0.0.1", "::1")}
    ours = {int(line.split()[0]) for line in guest.processes()}
    beyond = [entry for entry in psutil.net_connections("inet") if entry.pid in ours and entry.laddr
              and (entry.status == psutil.CONN_LISTEN or entry.type == socket.SOCK_DGRAM)
              and entry.laddr.ip not in ("127.0.0.1", "::1") and not entry.raddr]
    assert beyond == [], f"all that is new on this host: {new}"
    assert ("127.0.0.1", 9601) in host_listeners() - before, "the test sees what is bound"


def test_rules_come_and_go_while_it_runs(guest: User, monkeypatch: pytest.MonkeyPatch) -> None:
    guest.qvm("ports", "add", "19605:9602", "-p", "net", "--no-save-config")
    assert reaches(lambda: ask(("127.0.0.1", 19605)), b"bye")
    assert not reaches(lambda: ask(("127.0.0.1", 9602)), b"bye")
    shown = guest.qvm("ports", "net").stdout
    assert "127.0.0.1:19605" in shown and "19605:9602" not in (guest.home / "q" / "net" / "qvm.yaml").read_text()
    guest.qvm("ports", "rm", "19605:9602", "-p", "net", "--no-save-config")
    assert not reaches(lambda: ask(("127.0.0.1", 19605)), b"bye") and reaches(lambda: ask(("127.0.0.1", 9602)), b"bye")
    monkeypatch.setenv("QVM_HOME", guest.env["QVM_HOME"])
    vm = qvm.get("net")
    vm.forward(19606, 9602)
    assert reaches(lambda: ask(("127.0.0.1", 19606)), b"bye")
    vm.unforward(19606, 9602)
    refused = guest.qvm("ports", "add", "80:http", "-p", "net", check=False)
    assert refused.returncode == 2 and "neither a port" in refused.stderr


def test_load(guest: User) -> None:
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        assert set(pool.map(lambda _: ask(("127.0.0.1", 9601)), range(CONNECTIONS))) == {b"bye"}
    print("short connections, s:", time.monotonic() - began)
    began = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        assert set(pool.map(lambda _: ask(("127.0.0.1", 9602)), range(AT_ONCE))) == {b"bye"}
    print("at once, s:", time.monotonic() - began)


def test_transfers_arrive_whole(guest: User) -> None:
    wanted = hashlib.sha256()
    for _ in range(TRANSFER):
        wanted.update(BLOCK)
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", 9601), timeout=600) as peer:
        peer.sendall(b"r")
        for _ in range(TRANSFER):
            peer.sendall(BLOCK)
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(64) == wanted.digest()
    print("into the guest, MiB/s:", TRANSFER / (time.monotonic() - began))
    began, digest = time.monotonic(), hashlib.sha256()
    with socket.create_connection(("127.0.0.1", 9601), timeout=600) as peer:
        peer.sendall(b"s%d\n" % TRANSFER)
        while data := peer.recv(1 << 20):
            digest.update(data)
    assert digest.digest() == wanted.digest()
    print("out of the guest, MiB/s:", TRANSFER / (time.monotonic() - began))


def test_a_service_that_comes_and_goes(guest: User) -> None:
    """Whoever connects to port 9621 starts or stops the one at 9620."""
    guest.qvm("ssh", "net", "--", "sudo", "systemd-run", "--quiet", "--unit=toggle", "python3", "-c", TOGGLE)
    wait_for(lambda: ("127.0.0.1", 9621) in host_listeners(), 20, "the toggle")
    comes, goes = [], []
    for number in range(RESTARTS):
        assert ask(("127.0.0.1", 9621)) == b"bye"
        began = time.monotonic()
        wait_for(lambda: reaches(lambda: ask(("127.0.0.1", 9620)), b"bye"), 20, f"a forward in round {number}")
        comes.append(time.monotonic() - began)
        assert ask(("127.0.0.1", 9621)) == b"bye"
        began = time.monotonic()
        wait_for(lambda: ("127.0.0.1", 9620) not in host_listeners(), 20, f"no stale forward in round {number}")
        goes.append(time.monotonic() - began)
    print("comes, s:", sorted(comes)[len(comes) // 2])
    print("goes, s:", sorted(goes)[len(goes) // 2])


def test_everything_is_back_after_sshd_died_the_supervisor_died_and_a_nights_sleep(guest: User) -> None:
    guest.qvm("ssh", "net", "--", "sudo", "sh", "-c", "pkill -KILL sshd || true", check=False)
    wait_all(guest, BACK_WITHIN, "sshd killed")
    os.kill(supervisor_of(guest), signal.SIGKILL)
    wait_for(lambda: guest.status("net")["state"] == "unsupervised", 10, "the supervisor's end")
    guest.qvm("start", "net")
    wait_all(guest, BACK_WITHIN, "supervisor killed and started")
    guest.qvm("suspend", "net", timeout=600)
    assert all(address != ("127.0.0.1", 9611) for address in host_listeners())
    guest.qvm("resume", "net", timeout=600)
    wait_all(guest, BACK_WITHIN, "suspended and resumed")

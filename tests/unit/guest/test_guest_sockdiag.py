"""What the agent makes of the kernel's sock_diag(7): replies of any cut, and only those that say something new."""

from __future__ import annotations

import importlib
import socket
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from qvm import paths


@pytest.fixture(scope="module")
def agent(request: pytest.FixtureRequest) -> Any:
    """The agent's modules, which run in the guest and are no part of the package."""
    folder = str(paths.share_dir("cloud-init"))
    sys.path.insert(0, folder)
    request.addfinalizer(lambda: sys.path.remove(folder))
    return importlib.import_module


def message(family: int, address: str, port: int) -> bytes:
    raw = socket.inet_pton(family, address).ljust(16, b"\0")
    body = struct.pack("=BBBB", family, 10, 0, 0) + struct.pack(">HH", port, 0) + raw + bytes(48)
    return struct.pack("=IHHII", 16 + len(body), 20, 2, 1, 0) + body


DONE = struct.pack("=IHHIIi", 20, 3, 2, 1, 0, 0)


class Kernel:
    """Answers each request with the parts it was given."""

    def __init__(self, *replies: list[bytes]) -> None:
        self.replies = list(replies)
        self.parts: list[bytes] = []
        self.closed = False

    def send(self, request: bytes) -> None:
        assert not self.parts, "the last dump was not read to its end"
        self.parts = list(self.replies.pop(0))

    def recv_into(self, buffer: bytearray) -> int:
        part = self.parts.pop(0)
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self.closed = True


def test_replies_are_read_to_their_end_however_they_are_cut(agent: Any) -> None:
    sockdiag = agent("agent.sockdiag")
    one, two = message(socket.AF_INET, "127.0.0.1", 80), message(socket.AF_INET6, "::", 443)
    expected = {("127.0.0.1", 80), ("::", 443)}
    for parts in ([one + two, DONE], [one, two, DONE], [one + two + DONE]):
        diag = sockdiag.SocketDiag()
        diag.socket = Kernel(parts, [DONE])
        assert sockdiag.parse_dump(diag.dump("tcp")) == expected
        assert sockdiag.parse_dump(diag.dump("tcp")) == set()
    unbound = message(socket.AF_INET, "0.0.0.0", 0)
    assert sockdiag.parse_dump(unbound + one) == {("127.0.0.1", 80)}


def test_a_refusal_is_an_error_and_leaves_no_half_read_socket(agent: Any) -> None:
    sockdiag = agent("agent.sockdiag")
    diag = sockdiag.SocketDiag()
    kernel = diag.socket = Kernel([struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -2) + bytes(16)])
    with pytest.raises(FileNotFoundError, match="sock_diag"):
        diag.dump("udp")
    assert kernel.closed and diag.socket is None


def test_only_what_is_new_is_told(agent: Any, tmp_path: Path) -> None:
    """With the real kernel of this host."""
    listeners = agent("agent.listeners").Listeners(str(tmp_path))
    listeners.changed()
    with socket.socket(socket.AF_INET6) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        tcp.bind(("::1", 0))
        tcp.listen()
        udp.bind(("127.0.0.1", 0))
        told = listeners.changed()
        assert ["::1", tcp.getsockname()[1]] in told["tcp"] and ["127.0.0.1", udp.getsockname()[1]] in told["udp"]
        by_proc = listeners.by_proc("tcp")
        assert ("::1", tcp.getsockname()[1]) in by_proc, "the way of kernels without sock_diag finds the same"
        port = udp.getsockname()[1]
    gone = listeners.changed()
    assert ["127.0.0.1", port] not in gone["udp"]


def test_nothing_is_dumped_while_the_numbers_of_sockets_stay(agent: Any, tmp_path: Path) -> None:
    listeners = agent("agent.listeners").Listeners(str(tmp_path))
    numbers, dumps = [b"TCP: inuse 1"], []
    listeners.counts = lambda: list(numbers)
    listeners.sockets = lambda protocol: dumps.append(protocol) or b""
    listeners.SPARING = listeners.LONGEST_REST = 1e9
    listeners.changed()
    assert dumps == ["tcp", "udp"]
    listeners.changed()
    assert len(dumps) == 2
    numbers[0] = b"TCP: inuse 2"
    listeners.changed()
    assert len(dumps) == 4
    listeners.next_look = 0.0  # a socket that came as another went: the numbers do not tell
    listeners.changed()
    assert len(dumps) == 6


def test_the_numbers_of_sockets_change_with_each_listener(agent: Any, tmp_path: Path) -> None:
    listeners = agent("agent.listeners").Listeners(str(tmp_path))
    for family, kind in ((socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET6, socket.SOCK_DGRAM)):
        before = listeners.counts()
        assert len(before) == 3 and before[0].startswith(b"TCP: inuse ") and before[1].startswith(b"UDP: inuse ")
        with socket.socket(family, kind) as sock:
            sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
            if kind == socket.SOCK_STREAM:
                sock.listen()
            assert listeners.counts() != before

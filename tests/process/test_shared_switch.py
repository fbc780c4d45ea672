"""The switch between machines, with real sockets where QEMUs would be."""

from __future__ import annotations

import asyncio
import functools
import socket
import stat
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from qvm.instance import netaddr
from qvm.supervisor.switch import MAX_WAITING, Switch

EVERYBODY = "ff:ff:ff:ff:ff:ff"


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **options: Any) -> None:
        asyncio.run(test(*args, **options))

    return run


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="qvmsw") as name:
        monkeypatch.setenv("QVM_HOME", name)
        netaddr.folder().mkdir()
        yield Path(name)


@contextmanager
def machine(number: int) -> Iterator[socket.socket]:
    """What QEMU has: a socket of its own, from which it sends to its supervisor's."""
    path = netaddr.machine_socket(number)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.setblocking(False)
        yield sock


@contextmanager
def switch(number: int) -> Iterator[Switch]:
    made = Switch(number)
    try:
        yield made
    finally:
        made.close()


def frame(to: str, content: bytes = b"") -> bytes:
    return bytes.fromhex(to.replace(":", "")) + bytes(6) + b"\x08\0" + content


def say(sock: socket.socket, number: int, data: bytes) -> None:
    sock.sendto(data, str(netaddr.switch_socket(number)))


async def hear(sock: socket.socket, seconds: float = 5.0) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 70000), seconds)


def is_silent(sock: socket.socket) -> bool:
    try:
        sock.recv(70000)
    except BlockingIOError:
        return True
    return False


@in_loop
async def test_a_frame_reaches_the_machine_it_is_for_and_broadcasts_all_others() -> None:
    with machine(2) as one, machine(3) as two, machine(4) as three, switch(2):
        say(one, 2, frame(netaddr.mac(3), b"for two"))
        assert (await hear(two)).endswith(b"for two")
        for address in (EVERYBODY, "01:00:5e:00:00:01", "52:54:00:aa:bb:cc"):
            say(one, 2, frame(address, address.encode()))
            assert (await hear(two)).endswith(address.encode())
            assert (await hear(three)).endswith(address.encode())
        say(one, 2, b"short")
        say(one, 2, frame(netaddr.mac(3), b"x" * 60000))
        assert len(await hear(two)) == 60014, "large frames too; what is no frame is dropped"
        assert is_silent(one) and is_silent(three)


@in_loop
async def test_a_machine_that_starts_anew_and_a_switch_that_does_are_found_again() -> None:
    with machine(2) as one:
        with switch(2):
            for word in (b"first", b"second"):
                with machine(3) as two:
                    say(one, 2, frame(netaddr.mac(3), word))
                    assert (await hear(two)).endswith(word)
        with machine(3) as two, switch(2):
            say(one, 2, frame(netaddr.mac(3), b"third"))
            assert (await hear(two)).endswith(b"third")


@in_loop
async def test_who_takes_nothing_stops_nobody_and_costs_bounded_memory() -> None:
    with ExitStack() as stack:
        one, slow, quick = (stack.enter_context(machine(number)) for number in (2, 3, 4))
        made = stack.enter_context(switch(2))
        loop = asyncio.get_running_loop()
        for number in range(MAX_WAITING * 2):
            await loop.sock_sendto(one, frame(netaddr.mac(3), number.to_bytes(2, "big")),
                                   str(netaddr.switch_socket(2)))
            await asyncio.sleep(0)
        say(one, 2, frame(netaddr.mac(4), b"hello"))
        assert (await hear(quick)).endswith(b"hello")
        assert len(made._ways[3]._waiting) == MAX_WAITING
        heard = [int.from_bytes((await hear(slow))[-2:], "big") for _ in range(MAX_WAITING)]
        assert heard == list(range(MAX_WAITING)), "in order, and without a gap as far as they were kept"


@in_loop
async def test_frames_for_a_machine_that_goes_while_they_wait_are_dropped() -> None:
    loop = asyncio.get_running_loop()
    with machine(2) as one, switch(2) as made:
        with machine(3):
            for _ in range(50):
                await loop.sock_sendto(one, frame(netaddr.mac(3)), str(netaddr.switch_socket(2)))
                await asyncio.sleep(0)
        with machine(3) as two:
            async def send_until_heard() -> bytes:
                while True:
                    say(one, 2, frame(netaddr.mac(3), b"new"))
                    try:
                        return await hear(two, 0.2)
                    except TimeoutError:
                        continue

            async with asyncio.timeout(10):
                assert await send_until_heard()
        assert len(made._ways[3]._waiting) <= MAX_WAITING


@in_loop
async def test_nobody_else_may_write_to_it() -> None:
    with switch(1):
        assert stat.S_IMODE(netaddr.switch_socket(1).stat().st_mode) == 0o600

"""PortForwarder on real sockets: the host's own loopback plays the guest, on other port numbers."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from process_sshd import free_port, running_sshd

from qvm.errors import GuestError
from qvm.guest.bind import bind_loopback
from qvm.guest.dial import Connection
from qvm.guest.forward import PortForwarder
from qvm.guest.ssh import SshConnection
from qvm.wait import Deadline

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class LoopbackConnection:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    async def recv(self, limit: int = 262144) -> bytes:
        try:
            return await self._loop.sock_recv(self._sock, limit)
        except OSError as error:
            raise GuestError(str(error)) from error

    async def send(self, data: bytes) -> None:
        try:
            await self._loop.sock_sendall(self._sock, data)
        except OSError as error:
            raise GuestError(str(error)) from error

    async def send_eof(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    async def close(self) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()


class Guest:
    """A Dialer to ports that stand for others: the guest's port 8080 is really `ports[8080]`."""

    def __init__(self) -> None:
        self.ports: dict[tuple[str, int], int] = {}
        self.dialled: list[tuple[str, int]] = []
        self.through: SshConnection | None = None

    async def open_tcp(self, host: str, port: int) -> Connection:
        self.dialled.append((host, port))
        real = self.ports.get((host, port))
        if real is None:
            raise GuestError(f"connection to {host} port {port} refused")
        if self.through is not None:
            return await self.through.open_tcp("127.0.0.1", real)
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", real))
        return LoopbackConnection(sock)

    async def open_unix(self, path: str) -> Connection:
        raise GuestError("not here")

    @asynccontextmanager
    async def listening(self, host: str, port: int, handler: Handler) -> AsyncIterator[None]:
        server = await asyncio.start_server(handler, "127.0.0.1", 0)
        async with server:
            self.ports[host, port] = server.sockets[0].getsockname()[1]
            try:
                yield
            finally:
                del self.ports[host, port]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def greet_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"bye")
    writer.close()


async def fetch(port: int, data: bytes, *, host: str = "127.0.0.1") -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(data)
    writer.write_eof()
    answer = await reader.read(-1)
    writer.close()
    return answer


def refused(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return probe.connect_ex((host, port)) == errno.ECONNREFUSED


def run(main: Callable[[Guest, PortForwarder, list[dict[str, Any]]], Awaitable[None]], **options: Any) -> None:
    async def body() -> None:
        guest, events = Guest(), []
        forwarder = PortForwarder(guest, on_event=events.append, **options)
        try:
            await main(guest, forwarder, events)
        finally:
            await forwarder.close()

    asyncio.run(body())


def test_a_listener_appears_and_vanishes_with_its_forward() -> None:
    port = free_port()

    async def main(guest: Guest, forwarder: PortForwarder, events: list[dict[str, Any]]) -> None:
        async with guest.listening("127.0.0.1", port, echo):
            forwarder.set_listeners([("0.0.0.0", port)])
            assert await fetch(port, b"hello") == b"hello"
            assert await fetch(port, b"six", host="::1") == b"six"
            assert forwarder.status() == [
                {"protocol": "tcp", "guest": f"0.0.0.0:{port}", "host": f"127.0.0.1:{port}", "port": port,
                 "state": "forwarding", "reason": None, "path": "tunnel", "rule": None}
            ]
        forwarder.set_listeners([])
        assert refused(port) and refused(port, "::1") and forwarder.status() == []
        assert [event["state"] for event in events] == ["forwarding", "stopped"]

    run(main)


def test_nothing_is_bound_beyond_loopback() -> None:
    sockets = bind_loopback(free_port())
    try:
        assert {sock.getsockname()[0] for sock in sockets} <= {"127.0.0.1", "::1"}
    finally:
        for sock in sockets:
            sock.close()


def test_a_hundred_stops_and_starts_leave_no_stale_forward() -> None:
    port = free_port()

    async def main(guest: Guest, forwarder: PortForwarder, events: list[dict[str, Any]]) -> None:
        for number in range(100):
            async with guest.listening("127.0.0.1", port, greet_and_close):
                forwarder.set_listeners([("::", port)])
                assert forwarder.status()[0]["state"] == "forwarding", number
                assert await fetch(port, b"") == b"bye"
            forwarder.set_listeners([])
            assert refused(port), number

    run(main)


def test_two_thousand_short_connections_and_a_server_that_closes_first() -> None:
    port = free_port()

    async def main(guest: Guest, forwarder: PortForwarder, events: list[dict[str, Any]]) -> None:
        gate = asyncio.Semaphore(100)

        async def once() -> None:
            async with gate:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                assert await reader.read(-1) == b"bye", "the client sees the end though it has not closed"
                writer.close()

        async with guest.listening("127.0.0.1", port, greet_and_close):
            forwarder.set_listeners([("127.0.0.1", port)])
            await asyncio.gather(*(once() for _ in range(2000)))
            await asyncio.sleep(0.2)
            assert forwarder.connections == 0

    run(main)


def test_a_connection_outlives_its_listener() -> None:
    port = free_port()

    async def main(guest: Guest, forwarder: PortForwarder, events: list[dict[str, Any]]) -> None:
        async with guest.listening("127.0.0.1", port, echo):
            forwarder.set_listeners([("127.0.0.1", port)])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"one")
            assert await reader.readexactly(3) == b"one"
            forwarder.set_listeners([])
            writer.write(b"two")
            assert await reader.readexactly(3) == b"two"
            writer.close()

    run(main)


def test_a_taken_port_is_reported_and_forwarded_once_it_is_free() -> None:
    async def main(guest: Guest, forwarder: PortForwarder, events: list[dict[str, Any]]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            async with guest.listening("127.0.0.1", port, echo):
                forwarder.set_listeners([("0.0.0.0", port)])
                entry = forwarder.status()[0]
                assert entry["state"] == "taken" and "another process" in entry["reason"]
                await asyncio.sleep(1.2)
                assert [event["state"] for event in events] == ["taken"], "told once, not at each retry"
                other.close()
                began = time.monotonic()
                while forwarder.status()[0]["state"] != "forwarding":
                    assert time.monotonic() - began < 2
                    await asyncio.sleep(0.02)
                assert await fetch(port, b"at last") == b"at last"
        assert [event["state"] for event in events] == ["taken", "forwarding"]

    run(main)


def test_a_taken_port_that_vanishes_in_the_guest_is_no_longer_tried() -> None:
    async def main(guest: Guest, forwarder: PortForwarder, events: list[dict[str, Any]]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            forwarder.set_listeners([("0.0.0.0", port)])
            forwarder.set_listeners([])
        await asyncio.sleep(1.2)
        assert refused(port) and forwarder.status() == []

    run(main)


def test_ports_that_are_ours_are_left_alone() -> None:
    ours, theirs = free_port(), free_port()

    async def main(guest: Guest, forwarder: PortForwarder, events: list[dict[str, Any]]) -> None:
        forwarder.set_listeners([("0.0.0.0", 22), ("0.0.0.0", ours), ("127.0.0.53", 53), ("::1", theirs)])
        assert [entry["port"] for entry in forwarder.status()] == [theirs]

    run(main, ignore={ours})


def test_both_loopbacks_of_the_guest_are_tried() -> None:
    port = free_port()

    async def main(guest: Guest, forwarder: PortForwarder, events: list[dict[str, Any]]) -> None:
        async with guest.listening("::1", port, echo):
            forwarder.set_listeners([("::", port)])
            assert await fetch(port, b"x") == b"x"
            assert guest.dialled == [("127.0.0.1", port), ("::1", port)]

    run(main)


def test_a_guest_that_refuses_resets_the_client() -> None:
    port = free_port()

    async def main(guest: Guest, forwarder: PortForwarder, events: list[dict[str, Any]]) -> None:
        forwarder.set_listeners([("127.0.0.1", port)])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        writer.close()
        assert forwarder.connections == 0

    run(main)


def test_close_breaks_what_is_under_way() -> None:
    port = free_port()

    async def main(guest: Guest, forwarder: PortForwarder, events: list[dict[str, Any]]) -> None:
        async with guest.listening("127.0.0.1", port, echo):
            forwarder.set_listeners([("127.0.0.1", port)])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"x")
            await reader.readexactly(1)
            await forwarder.close()
            with pytest.raises(ConnectionResetError):
                await reader.readexactly(1)
            writer.close()
            assert refused(port)

    run(main)


def test_forwards_over_ssh_come_back_after_sshd_died(tmp_path: Path) -> None:
    port = free_port()

    async def main() -> None:
        with running_sshd(tmp_path / "sshd") as server:
            guest = Guest()
            guest.through = SshConnection(server.target)
            forwarder = PortForwarder(guest)
            try:
                await guest.through.wait_ready(Deadline(20))
                async with guest.listening("127.0.0.1", port, echo):
                    forwarder.set_listeners([("127.0.0.1", port)])
                    data = b"0123456789" * 300_000
                    assert await fetch(port, data) == data
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.write(b"x")
                    await reader.readexactly(1)
                    server.stop()
                    with pytest.raises(ConnectionResetError):
                        await asyncio.wait_for(reader.readexactly(1), 5)
                    writer.close()
                    server.start()
                    began = time.monotonic()
                    assert await fetch(port, b"again") == b"again"
                    assert time.monotonic() - began < 10
            finally:
                await forwarder.close()
                await guest.through.close()

    asyncio.run(main())

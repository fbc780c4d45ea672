"""SshConnection against a real sshd: streams, refusals, silence, death and rebuilding."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from process_sshd import Sshd, free_port, running_sshd

from qvm.errors import GuestError, NotReadyError
from qvm.guest.ssh import SshConnection
from qvm.wait import Deadline

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def own_sshd(tmp_path: Path) -> Iterator[Sshd]:
    """One that the test may kill."""
    with running_sshd(tmp_path / "sshd") as server:
        yield server


@asynccontextmanager
async def connected(sshd: Sshd) -> AsyncIterator[SshConnection]:
    connection = SshConnection(sshd.target)
    try:
        await connection.wait_ready(Deadline(20))
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def answer_at_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads to the end of input, then answers with what it counted: only works with half-close."""
    data = await reader.read(-1)
    writer.write(f"{len(data)} {hashlib.sha256(data).hexdigest()}".encode())
    writer.close()


async def read_all(stream: object) -> bytes:
    pieces = []
    while piece := await stream.recv():  # type: ignore[attr-defined]
        pieces.append(piece)
    return b"".join(pieces)


def test_a_half_closed_stream_still_gets_its_answer(sshd: Sshd) -> None:
    async def main() -> None:
        async with connected(sshd) as ssh, serving(answer_at_end) as port:
            stream = await ssh.open_tcp("127.0.0.1", port)
            await stream.send(b"hello ")
            await stream.send(b"guest")
            await stream.send_eof()
            await stream.send_eof()
            assert (await read_all(stream)).split()[0] == b"11"
            await stream.close()
            await stream.close()

    asyncio.run(main())


def test_much_data_arrives_whole_both_ways(sshd: Sshd) -> None:
    data = os.urandom(1 << 20) * 24

    async def mirror(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
        writer.close()

    async def main() -> None:
        async with connected(sshd) as ssh, serving(mirror) as port:
            stream = await ssh.open_tcp("127.0.0.1", port)

            async def feed() -> None:
                await stream.send(data)
                await stream.send_eof()

            feeding = asyncio.create_task(feed())
            assert hashlib.sha256(await read_all(stream)).digest() == hashlib.sha256(data).digest()
            await feeding

    asyncio.run(main())


def test_a_slow_reader_holds_up_the_sender(sshd: Sshd) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
                sent += 65536
        except OSError:
            writer.close()

    async def main() -> None:
        async with connected(sshd) as ssh, serving(flood) as port:
            stream = await ssh.open_tcp("127.0.0.1", port)
            await stream.recv(1)
            await asyncio.sleep(1.5)
            assert sent < 64 << 20, "an unread stream must not fill memory without end"
            await stream.close()

    asyncio.run(main())


def test_a_unix_socket_is_reached(sshd: Sshd, tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "with space.sock"
        async with connected(sshd) as ssh, await asyncio.start_unix_server(answer_at_end, path):
            stream = await ssh.open_unix(str(path))
            await stream.send(b"abc")
            await stream.send_eof()
            assert (await read_all(stream)).startswith(b"3 ")

    asyncio.run(main())


def test_what_is_not_there_is_refused_and_the_connection_lives_on(sshd: Sshd, tmp_path: Path) -> None:
    async def main() -> None:
        async with connected(sshd) as ssh, serving(answer_at_end) as port:
            with pytest.raises(GuestError, match="refused"):
                await ssh.open_tcp("127.0.0.1", free_port())
            with pytest.raises(GuestError, match="refused"):
                await ssh.open_unix(str(tmp_path / "missing.sock"))
            stream = await ssh.open_tcp("127.0.0.1", port)
            await stream.send_eof()
            assert (await read_all(stream)).startswith(b"0 ")

    asyncio.run(main())


def test_a_thousand_short_connections_leave_nothing_behind(sshd: Sshd) -> None:
    async def main() -> None:
        async with connected(sshd) as ssh, serving(answer_at_end) as port:
            gate = asyncio.Semaphore(20)

            async def once(number: int) -> None:
                async with gate:
                    stream = await ssh.open_tcp("127.0.0.1", port)
                    await stream.send(str(number).encode())
                    await stream.send_eof()
                    assert (await read_all(stream)).split()[0] == str(len(str(number))).encode()
                    await stream.close()

            await asyncio.gather(*(once(number) for number in range(1000)))
            await asyncio.sleep(0.3)
            transport = ssh._transport
            assert transport is not None
            assert not transport._open and not transport.channels_seen and not transport.channel_events

    asyncio.run(main())


def test_another_host_key_is_never_accepted(sshd: Sshd) -> None:
    kind, _ = sshd.host_key.split()[:2]
    other = base64.b64encode(base64.b64decode(sshd.host_key.split()[1])[:-32] + bytes(32)).decode()

    async def main() -> None:
        ssh = SshConnection(replace(sshd.target, host_key=f"{kind} {other}"))
        with pytest.raises(NotReadyError, match="another host key"):
            await ssh.wait_ready(Deadline(3))
        await ssh.close()

    asyncio.run(main())


def test_an_unknown_client_key_is_reported(sshd: Sshd, tmp_path: Path) -> None:
    from qvm.guest.keys import ensure_key

    ensure_key(tmp_path / "stranger", comment="stranger")

    async def main() -> None:
        ssh = SshConnection(replace(sshd.target, key=tmp_path / "stranger"))
        with pytest.raises(NotReadyError, match="Authentication failed"):
            await ssh.wait_ready(Deadline(4))
        await ssh.close()

    asyncio.run(main())


def test_an_accepted_connection_is_no_readiness() -> None:
    """QEMU's user network accepts before sshd runs; a server that says nothing must count as not ready."""

    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            from qvm.guest.ssh import SshTarget

            target = SshTarget(silent.getsockname()[1], "nobody", Path("/nonexistent"), "ssh-ed25519 AAAA")
            ssh = SshConnection(target)
            began = time.monotonic()
            with pytest.raises(NotReadyError, match="within 1 s"):
                await ssh.wait_ready(Deadline(1))
            await ssh.close()
            assert time.monotonic() - began < 3, "closing must not wait for the attempt's own patience"

    asyncio.run(main())


def test_sshd_that_comes_late_is_met(tmp_path: Path) -> None:
    async def main() -> None:
        with running_sshd(tmp_path / "sshd") as server:
            server.stop()
            ssh = SshConnection(server.target)
            waiting = asyncio.create_task(ssh.wait_ready(Deadline(20)))
            await asyncio.sleep(0.7)
            assert not waiting.done() and "nothing listens" in ssh.reason
            server.start()
            await waiting
            await ssh.close()

    asyncio.run(main())


def test_a_killed_sshd_is_replaced_and_streams_break_at_once(own_sshd: Sshd) -> None:
    async def main() -> None:
        changes: list[bool] = []
        ssh = SshConnection(own_sshd.target, on_change=changes.append)
        await ssh.wait_ready(Deadline(20))
        async with serving(answer_at_end) as port:
            stream = await ssh.open_tcp("127.0.0.1", port)
            own_sshd.stop()
            with pytest.raises(GuestError):
                await asyncio.wait_for(stream.recv(), 5)
            with pytest.raises(GuestError):
                await stream.send(b"x")
            own_sshd.start()
            began = time.monotonic()
            again = await ssh.open_tcp("127.0.0.1", port)
            assert time.monotonic() - began < 10
            await again.send_eof()
            assert (await read_all(again)).startswith(b"0 ")
        await ssh.close()
        assert changes == [True, False, True]

    asyncio.run(main())


def test_a_frozen_guest_is_noticed_within_ten_seconds_and_met_again(own_sshd: Sshd) -> None:
    async def main() -> None:
        ssh = SshConnection(own_sshd.target)
        await ssh.wait_ready(Deadline(20))
        await asyncio.sleep(4)
        assert ssh.connected, "a connection in good health must survive its own keepalive"
        own_sshd.signal_all(signal.SIGSTOP)
        try:
            began = time.monotonic()
            while ssh.connected and time.monotonic() - began < 15:
                await asyncio.sleep(0.05)
            noticed = time.monotonic() - began
        finally:
            own_sshd.signal_all(signal.SIGCONT)
        assert noticed < 10 and "not answered" in ssh.reason
        await ssh.wait_ready(Deadline(15))
        await ssh.close()

    asyncio.run(main())

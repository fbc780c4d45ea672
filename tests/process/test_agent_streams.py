"""Byte streams through the real agent: everything a forwarded socket relies on."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from agent_process import AgentProcess, drive, eventually, running

from qvm.errors import GuestError
from qvm.guest.channel import AgentChannel
from qvm.guest.dial import Connection, Dialer
from qvm.guest.streams import StreamMux


@asynccontextmanager
async def streams(folder: Path) -> AsyncIterator[tuple[AgentProcess, AgentChannel, StreamMux]]:
    async with running(folder) as (process, channel):
        mux = StreamMux(channel)
        await mux.connect(process.streams.path)
        try:
            yield process, channel, mux
        finally:
            await mux.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


async def read_all(connection: Connection) -> bytes:
    parts = []
    while data := await connection.recv():
        parts.append(data)
    return b"".join(parts)


def test_tcp_and_unix_both_ways_with_half_close(tmp_path: Path) -> None:
    async def work() -> None:
        async with streams(tmp_path) as (_, _, mux):
            dialer: Dialer = mux
            tcp = await asyncio.start_server(echo, "127.0.0.1", 0)
            unix = await asyncio.start_unix_server(echo, tmp_path / "echo.sock")
            port = tcp.sockets[0].getsockname()[1]
            data = os.urandom(3 << 20)
            for connection in (await dialer.open_tcp("127.0.0.1", port), await dialer.open_tcp("localhost", port),
                               await dialer.open_unix(str(tmp_path / "echo.sock"))):
                reading = asyncio.create_task(read_all(connection))
                await connection.send(data)
                await connection.send_eof()
                assert await reading == data
                await connection.close()
                await connection.close()
            assert mux._streams == {}
            tcp.close()
            unix.close()

    drive(work)


def test_refusals_name_the_reason(tmp_path: Path) -> None:
    async def work() -> None:
        async with streams(tmp_path) as (process, _, mux):
            with pytest.raises(GuestError, match="refused"):
                await mux.open_tcp("127.0.0.1", 1)
            with pytest.raises(GuestError, match="No such file"):
                await mux.open_unix("/no/such.sock")
            with pytest.raises(GuestError, match="could not connect"):
                await mux.open_tcp("no-names-here.invalid", 80)
            with pytest.raises(GuestError, match="could not connect"):
                await mux.open_unix("/" + "x" * 200)
            await eventually(lambda: sum("socket" in fd for fd in process.fds()) <= 3)

    drive(work)


def test_the_server_ends_first(tmp_path: Path) -> None:
    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.close()

    async def work() -> None:
        async with streams(tmp_path) as (_, _, mux):
            server = await asyncio.start_server(greet, "127.0.0.1", 0)
            connection = await mux.open_tcp("127.0.0.1", server.sockets[0].getsockname()[1])
            assert await read_all(connection) == b"bye"
            await connection.send_eof()
            assert mux._streams == {}
            server.close()

    drive(work)


def test_a_reset_in_the_guest_is_a_reset_here_and_back(tmp_path: Path) -> None:
    async def work() -> None:
        async with streams(tmp_path) as (_, _, mux):
            with socket.create_server(("127.0.0.1", 0)) as server:
                connection = await mux.open_tcp("127.0.0.1", server.getsockname()[1])
                peer, _ = server.accept()
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                peer.close()
                with pytest.raises(GuestError, match="reset"):
                    await connection.recv()
                with pytest.raises(GuestError):
                    await connection.send(b"x")
                other = await mux.open_tcp("127.0.0.1", server.getsockname()[1])
                peer, _ = server.accept()
                await other.close()
                peer.settimeout(5)
                assert await asyncio.to_thread(peer.recv, 10) == b""
                peer.close()

    drive(work)


def test_a_reader_that_stops_holds_up_nobody_else(tmp_path: Path) -> None:
    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        try:
            for _ in range(64):
                writer.write(bytes(1 << 20))
                await writer.drain()
        except OSError:
            return
        writer.close()

    async def work() -> None:
        async with streams(tmp_path) as (process, _, mux):
            pouring = await asyncio.start_server(pour, "127.0.0.1", 0)
            echoing = await asyncio.start_server(echo, "127.0.0.1", 0)
            silent = socket.create_server(("127.0.0.1", 0))
            unread = await mux.open_tcp("127.0.0.1", pouring.sockets[0].getsockname()[1])
            await unread.send(b"x")
            stuck = await mux.open_tcp("127.0.0.1", silent.getsockname()[1])
            sending = asyncio.create_task(stuck.send(bytes(64 << 20)))
            await asyncio.sleep(0.3)
            began = time.monotonic()
            quick = await mux.open_tcp("127.0.0.1", echoing.sockets[0].getsockname()[1])
            await quick.send(b"ping")
            assert await quick.recv() == b"ping"
            assert time.monotonic() - began < 1
            assert not sending.done()
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096
            assert resident < 64 << 20
            assert len(await read_all(unread)) == 64 << 20
            sending.cancel()
            for closing in (pouring, echoing, silent):
                closing.close()

    drive(work)


def test_a_thousand_short_connections_leave_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        async with streams(tmp_path) as (process, _, mux):
            server = await asyncio.start_server(echo, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]

            async def once(number: int) -> None:
                connection = await mux.open_tcp("127.0.0.1", port)
                await connection.send(b"%d" % number)
                await connection.send_eof()
                assert await read_all(connection) == b"%d" % number
                await connection.close()

            before = len(process.fds())
            for start in range(0, 1000, 50):
                await asyncio.gather(*(once(number) for number in range(start, start + 50)))
            await eventually(lambda: len(process.fds()) <= before)
            assert mux._streams == {}
            server.close()

    drive(work)


def test_a_full_backlog_of_a_unix_listener_is_waited_for(tmp_path: Path) -> None:
    async def work() -> None:
        async with streams(tmp_path) as (_, _, mux):
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(tmp_path / "busy.sock"))
                server.listen(0)
                opening = [asyncio.create_task(mux.open_unix(str(tmp_path / "busy.sock"))) for _ in range(4)]
                await asyncio.sleep(0.2)
                assert not all(task.done() for task in opening)
                accepted = [(await asyncio.to_thread(server.accept))[0] for _ in range(4)]
                await asyncio.gather(*opening)
                for sock in accepted:
                    sock.close()

    drive(work)


def test_a_new_host_begins_in_the_middle_of_a_frame(tmp_path: Path) -> None:
    async def work() -> None:
        async with streams(tmp_path) as (process, channel, first):
            server = await asyncio.start_server(echo, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            old = await first.open_tcp("127.0.0.1", port)
            await old.send(bytes(100_000))
            first.write(b"\0\0\0\1\4\0\1\0\0only half of it")
            assert first._transport is not None
            first._transport.abort()
            second = StreamMux(channel)
            await second.connect(process.streams.path)
            connection = await second.open_tcp("127.0.0.1", port)
            await connection.send(b"clean")
            assert await connection.recv() == b"clean"
            with pytest.raises(GuestError):
                while await old.recv():
                    pass
            await second.close()
            server.close()

    drive(work)


def test_throughput_is_no_bottleneck(tmp_path: Path) -> None:
    async def pour(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(64):
            writer.write(bytes(1 << 20))
            await writer.drain()
        writer.close()

    async def work() -> None:
        async with streams(tmp_path) as (_, _, mux):
            server = await asyncio.start_server(pour, "127.0.0.1", 0)
            connection = await mux.open_tcp("127.0.0.1", server.sockets[0].getsockname()[1])
            began, size = time.monotonic(), 0
            while data := await connection.recv():
                size += len(data)
            rate = size / (time.monotonic() - began) / (1 << 20)
            print(f"{rate:.0f} MiB/s")
            assert rate > 20
            server.close()

    drive(work)

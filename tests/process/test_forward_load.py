"""Forwards through the real agent under load. Full counts: QVM_TEST_CONNECTIONS=10000 QVM_TEST_AT_ONCE=500
QVM_TEST_TRANSFER=2048 (MiB) QVM_TEST_RESTARTS=100."""

from __future__ import annotations

import asyncio
import hashlib
import resource
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
from forward_parts import (
    PIECE,
    accept_all,
    amount,
    ask_for_end,
    count_and_answer,
    forwarded,
    forwarder_of,
    say_bye,
    send_what_is_asked,
)
from process_sshd import free_port
from test_agent_streams import streams

CONNECTIONS = amount("QVM_TEST_CONNECTIONS", 1000)
AT_ONCE = amount("QVM_TEST_AT_ONCE", 200)
TRANSFER = amount("QVM_TEST_TRANSFER", 64)
RESTARTS = amount("QVM_TEST_RESTARTS", 15)

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(autouse=True)
def descriptors() -> None:
    """Both ends, the relay's and the service's sockets of all connections at once are in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 8 * AT_ONCE + 200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8 * AT_ONCE + 200), hard))


def test_short_connections_to_a_server_that_closes_first(tmp_path: Path) -> None:
    async def work() -> None:
        async with forwarded(tmp_path, say_bye) as port:
            gate = asyncio.Semaphore(20)

            async def once() -> None:
                async with gate:
                    assert await asyncio.wait_for(ask_for_end(port), 60) == b"bye"

            await asyncio.gather(*(once() for _ in range(CONNECTIONS)))

    asyncio.run(work())


def test_many_connections_at_once(tmp_path: Path) -> None:
    async def work() -> None:
        everybody_is_here = threading.Barrier(AT_ONCE)

        def wait_for_all(peer: socket.socket) -> None:
            everybody_is_here.wait(120)
            peer.sendall(b"all")

        async with forwarded(tmp_path, wait_for_all) as port:
            answers = await asyncio.wait_for(asyncio.gather(*(ask_for_end(port) for _ in range(AT_ONCE))), 120)
            assert answers == [b"all"] * AT_ONCE

    asyncio.run(work())


def test_a_large_transfer_each_way_arrives_whole(tmp_path: Path) -> None:
    pieces = TRANSFER * (1 << 20) // len(PIECE)
    wanted = hashlib.sha256()
    for _ in range(pieces):
        wanted.update(PIECE)

    async def work() -> None:
        async with forwarded(tmp_path / "up", count_and_answer) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            for _ in range(pieces):
                writer.write(PIECE)
                await writer.drain()
            writer.write_eof()
            assert await reader.read() == wanted.digest()
            writer.close()
        async with forwarded(tmp_path / "down", send_what_is_asked) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
            writer.write(b"%d\n" % pieces)
            digest, left = hashlib.sha256(), pieces * len(PIECE)
            while left:
                data = await reader.read(min(left, 1 << 20))
                assert data, f"{left} bytes are missing"
                digest.update(data)
                left -= len(data)
            assert digest.digest() == wanted.digest() == await reader.read()
            writer.close()

    for name in ("up", "down"):
        (tmp_path / name).mkdir()
    asyncio.run(work())


def test_slow_readers_bound_memory_on_both_sides_and_do_not_hold_up_others(tmp_path: Path) -> None:
    """Twenty clients that do not read 64 MiB each: the senders stand still, and another one is served at once."""

    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            guest, host = server.getsockname()[1], free_port()
            threading.Thread(target=accept_all, args=(server, send_what_is_asked), daemon=True).start()
            async with streams(tmp_path) as (agent, _, mux):
                forwarder = forwarder_of(mux, f"{host}:{guest}")
                forwarder.set_listeners([("127.0.0.1", guest)])
                us, it = psutil.Process(), psutil.Process(agent.pid)
                before = us.memory_info().rss, it.memory_info().rss
                slow = []
                for _ in range(20):
                    sock = socket.create_connection(("127.0.0.1", host))
                    sock.sendall(b"256\n")
                    slow.append(sock)
                    await asyncio.sleep(0.05)
                began = time.monotonic()
                reader, writer = await asyncio.open_connection("127.0.0.1", host)
                writer.write(b"0\n")
                assert await asyncio.wait_for(reader.read(), 10) == hashlib.sha256().digest()
                assert time.monotonic() - began < 3
                await asyncio.sleep(0.5)
                grown = us.memory_info().rss - before[0], it.memory_info().rss - before[1]
                # 512 KiB of credit for each stream, and what the sockets' own buffers keep is the kernel's.
                assert max(grown) < 48 << 20, f"{[size >> 20 for size in grown]} MiB for 1280 MiB that wait"
                for sock in slow:
                    sock.close()
                await forwarder.close()

    asyncio.run(work())


def test_a_service_that_stops_and_starts_leaves_no_stale_forward(tmp_path: Path) -> None:
    """With the agent's own reports: after each stop the host's port is free, after each start it answers."""

    async def work() -> None:
        guest, host = free_port(), free_port()
        async with streams(tmp_path) as (_, channel, mux):
            forwarder = forwarder_of(mux, f"{host}:{guest}")
            channel.on_event = lambda event: (
                forwarder.set_listeners([(at, port) for at, port in event["tcp"]])
                if event["event"] == "listeners" else None)
            await channel.watch_listeners()
            delays = []
            for number in range(RESTARTS):
                server = socket.create_server(("127.0.0.1", guest))
                threading.Thread(target=accept_all, args=(server, say_bye), daemon=True).start()
                began = time.monotonic()
                while not forwarder.status():
                    assert time.monotonic() - began < 5, f"no forward in round {number}"
                    await asyncio.sleep(0.002)
                delays.append(time.monotonic() - began)
                assert await ask_for_end(host) == b"bye"
                server.shutdown(socket.SHUT_RDWR)
                server.close()
                began = time.monotonic()
                while forwarder.status():
                    assert time.monotonic() - began < 5, f"a stale forward in round {number}"
                    await asyncio.sleep(0.002)
                with pytest.raises(ConnectionRefusedError):
                    await asyncio.open_connection("127.0.0.1", host)
            # The agent looks every 100 ms. The best quarter, since others use this machine too.
            assert sorted(delays)[len(delays) // 4] < 0.2, sorted(delays)
            await forwarder.close()

    asyncio.run(work())

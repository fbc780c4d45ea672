"""What the agent does for forwards beyond connecting: datagrams, sockets that listen in the guest, reports of UDP."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from agent_process import drive, eventually, running
from process_sshd import free_port
from test_agent_streams import echo, read_all, streams

from qvm.config.ports import PortForward, parse_rule
from qvm.errors import GuestError
from qvm.guest.datagrams import DatagramRelay
from qvm.guest.reverse import ReverseForwards


class Upper(asyncio.DatagramProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data.upper(), addr)


async def ask(sock: socket.socket, data: bytes, port: int) -> bytes:
    loop = asyncio.get_running_loop()
    await loop.sock_sendto(sock, data, ("127.0.0.1", port))
    return await asyncio.wait_for(loop.sock_recv(sock, 65535), 5)


def udp_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.setblocking(False)
    return sock


def test_datagrams_keep_their_borders_and_senders_apart(tmp_path: Path) -> None:
    async def work() -> None:
        async with streams(tmp_path) as (process, _, mux):
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Upper, ("127.0.0.1", 0))
            port = transport.get_extra_info("sockname")[1]
            host = udp_socket()
            relay = DatagramRelay(host, lambda: mux.open_udp("127.0.0.1", port), name="test")
            at = host.getsockname()[1]
            one, two = udp_socket(), udp_socket()
            for data in (b"a", b"b" * 1400, b"c" * 60000):
                assert await ask(one, data, at) == data.upper()
            assert await ask(two, b"two", at) == b"TWO"
            assert await ask(one, b"again", at) == b"AGAIN"
            assert relay.flows == 2
            relay.close()
            await eventually(lambda: not [fd for fd in process.fds() if "socket" in fd][2:])
            for sock in (one, two):
                sock.close()
            transport.close()

    drive(work)


def test_a_datagram_to_nobody_is_lost_and_the_next_one_is_not(tmp_path: Path) -> None:
    async def work() -> None:
        async with streams(tmp_path) as (_, _, mux):
            port = free_port()
            way = await mux.open_udp("127.0.0.1", port)
            await way.send_message(b"lost")
            await asyncio.sleep(0.2)
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Upper, ("127.0.0.1", port))
            await way.send_message(b"heard")  # carries the refusal of the first one, as sockets do
            await way.send_message(b"heard")
            assert await asyncio.wait_for(way.recv_message(), 5) == b"HEARD"
            await way.close()
            transport.close()

    drive(work)


def test_the_agent_listens_for_the_host(tmp_path: Path) -> None:
    async def work() -> None:
        async with streams(tmp_path) as (_, _, mux):
            port, path = free_port(), tmp_path / "in-guest.sock"
            tcp, unix = await mux.listen_tcp("127.0.0.1", port), await mux.listen_unix(str(path))
            for listener, connect in ((tcp, asyncio.open_connection("127.0.0.1", port)),
                                      (unix, asyncio.open_unix_connection(path))):
                reader, writer = await connect
                connection = await asyncio.wait_for(listener.accept(), 5)
                data = os.urandom(1 << 20)
                writer.write(data)
                writer.write_eof()
                assert await read_all(connection) == data
                await connection.send(b"thanks")
                await connection.send_eof()
                assert await reader.read() == b"thanks"
                writer.close()
            with pytest.raises(GuestError, match="in use"):
                await mux.listen_tcp("127.0.0.1", port)
            await tcp.close()
            await unix.close()
            await eventually(lambda: not path.exists())
            again = await mux.listen_tcp("127.0.0.1", port)
            await again.close()

    drive(work)


def test_two_hundred_connections_wait_for_the_host(tmp_path: Path) -> None:
    async def work() -> None:
        async with streams(tmp_path) as (_, _, mux):
            port = free_port()
            listener = await mux.listen_tcp("127.0.0.1", port)
            clients = await asyncio.gather(*(asyncio.open_connection("127.0.0.1", port) for _ in range(180)))
            for _ in clients:
                connection = await asyncio.wait_for(listener.accept(), 5)
                await connection.send(b"x")
                await connection.close()
            for reader, writer in clients:
                assert await reader.read(1) == b"x"
                writer.close()
            await listener.close()

    drive(work)


def test_reverse_forwards_lead_to_the_host_and_come_back_after_an_agents_end(tmp_path: Path) -> None:
    async def work() -> None:
        async with streams(tmp_path) as (process, _, mux):
            server = await asyncio.start_server(echo, "127.0.0.1", 0)
            host_port, guest_port = server.sockets[0].getsockname()[1], free_port()
            path = tmp_path / "g.sock"
            rules: list[PortForward] = [parse_rule(f"reverse:{host_port}:{guest_port}"),
                                        parse_rule(f"reverse:{host_port}:{path}")]
            events: list[str] = []
            reverse = ReverseForwards(mux)
            reverse.on_change = lambda entry: events.append(entry["state"])
            reverse.set_rules(rules)
            await eventually(lambda: events == ["forwarding"] * 2)

            async def both() -> None:
                for reader, writer in (await asyncio.open_connection("127.0.0.1", guest_port),
                                       await asyncio.open_unix_connection(path)):
                    writer.write(b"hello")
                    writer.write_eof()
                    assert await asyncio.wait_for(reader.read(), 5) == b"hello"
                    writer.close()

            await both()
            await process.kill()
            await process.start()
            await eventually(lambda: [entry["state"] for entry in reverse.status()] == ["forwarding"] * 2
                             and "failed" in events, 10)
            await both()
            reverse.set_rules(rules[:1])
            await eventually(lambda: not path.exists())
            await reverse.close()
            server.close()

    drive(work)


def test_udp_sockets_are_reported_and_connected_ones_are_not(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (_, channel):
            reports: list[dict[str, Any]] = []
            channel.on_event = lambda event: reports.append(event) if event["event"] == "listeners" else None
            await channel.watch_listeners()
            bound, connected = udp_socket(), udp_socket()
            connected.connect(bound.getsockname())
            wanted, other = list(bound.getsockname()), list(connected.getsockname())
            await eventually(lambda: bool(reports) and wanted in reports[-1]["udp"])
            await asyncio.sleep(0.3)
            assert other not in reports[-1]["udp"] and wanted not in reports[-1]["tcp"]
            bound.close()
            await eventually(lambda: wanted not in reports[-1]["udp"])
            connected.close()

    drive(work)

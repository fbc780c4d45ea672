"""Forwards by rules: sockets, the user network with a QEMU that plays along or does not, other rules meanwhile."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from agent_process import drive, eventually
from forward_parts import accept_all, ask_for_end, forwarder_of, say_bye
from process_sshd import free_port, running_sshd
from test_agent_streams import streams
from test_forward_ports import Guest, echo, fetch, refused

from qvm.config.ports import parse_rule
from qvm.errors import GuestError
from qvm.guest.forward import PortForwarder
from qvm.guest.ssh import SshConnection
from qvm.wait import Deadline


class FakeNetwork:
    """QEMU's forwards as far as a forwarder sees them: a bound port, and orders in their order."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.sockets: dict[tuple[str, str, int], socket.socket] = {}
        self.log: list[str] = []

    async def add(self, protocol: str, address: str, port: int, guest_port: int) -> None:
        await asyncio.sleep(0.02)
        self.log.append(f"add {protocol} {port} {guest_port}")
        if self.refuses:
            raise GuestError("QEMU did not take the forward")
        kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
        sock = socket.socket(socket.AF_INET, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(protocol == "tcp"))
        sock.bind((address, port))
        if protocol == "tcp":
            sock.listen(1)
        self.sockets[protocol, address, port] = sock

    async def remove(self, protocol: str, address: str, port: int) -> None:
        await asyncio.sleep(0.02)
        self.log.append(f"remove {protocol} {port}")
        self.sockets.pop((protocol, address, port)).close()


def states(forwarder: PortForwarder) -> list[tuple[str, str | None]]:
    return [(entry["state"], entry["path"]) for entry in forwarder.status()]


def make(guest: Guest, network: FakeNetwork, events: list[dict[str, Any]] | None = None) -> PortForwarder:
    return PortForwarder(guest, user_network=network, by_user_network=("tcp", "udp"),
                         on_event=None if events is None else events.append)


def test_a_wildcard_goes_by_the_user_network_and_a_loopback_listener_by_the_tunnel() -> None:
    async def work() -> None:
        guest, network, events = Guest(), FakeNetwork(), []
        forwarder = make(guest, network, events)
        port = free_port()
        async with guest.listening("127.0.0.1", port, echo):
            forwarder.set_listeners([("0.0.0.0", port)])
            assert states(forwarder) == [("opening", "user-network")]
            await eventually(lambda: states(forwarder) == [("forwarding", "user-network")])
            assert await fetch(port, b"six", host="::1") == b"six", "QEMU knows no IPv6 here: that end is ours"
            forwarder.set_listeners([("127.0.0.1", port)])
            await eventually(lambda: states(forwarder) == [("forwarding", "tunnel")])
            assert await fetch(port, b"hello") == b"hello"
            forwarder.set_listeners([])
            assert refused(port)
        assert network.log == [f"add tcp {port} {port}", f"remove tcp {port}"]
        assert [event["event"] for event in events] == [
            "forwarding", "stopped", "forwarding", "stopped"]
        await forwarder.close()

    drive(work)


def test_a_listener_that_is_gone_before_qemu_answers_leaves_nothing() -> None:
    async def work() -> None:
        guest, network = Guest(), FakeNetwork()
        forwarder = make(guest, network)
        port = free_port()
        for _ in range(5):
            forwarder.set_listeners([("0.0.0.0", port)])
            await asyncio.sleep(0.005)
            forwarder.set_listeners([])
        await asyncio.sleep(0.3)
        assert not network.sockets and refused(port) and forwarder.status() == []
        await forwarder.close()

    drive(work)


def test_where_qemu_refuses_the_tunnel_does_it() -> None:
    async def work() -> None:
        guest, network = Guest(), FakeNetwork(refuses=True)
        forwarder = make(guest, network)
        port = free_port()
        async with guest.listening("127.0.0.1", port, echo):
            forwarder.set_listeners([("0.0.0.0", port)])
            await eventually(lambda: states(forwarder) == [("forwarding", "tunnel")])
            assert await fetch(port, b"hello") == b"hello"
        await forwarder.close()

    drive(work)


def test_closing_takes_the_forwards_from_qemu() -> None:
    async def work() -> None:
        network = FakeNetwork()
        forwarder = make(Guest(), network)
        port = free_port()
        forwarder.set_rules([parse_rule(f"{port}/any")])
        forwarder.set_listeners([("0.0.0.0", port)], [("0.0.0.0", port)])
        await eventually(lambda: len(network.sockets) == 2)
        await forwarder.close()
        assert not network.sockets

    drive(work)


def test_a_taken_port_is_not_asked_of_qemu_until_it_is_free() -> None:
    async def work() -> None:
        network = FakeNetwork()
        forwarder = make(Guest(), network)
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            forwarder.set_listeners([("0.0.0.0", port)])
            assert [state for state, _ in states(forwarder)] == ["taken"] and network.log == []
        await eventually(lambda: states(forwarder) == [("forwarding", "user-network")])
        await forwarder.close()

    drive(work)


def test_sockets_on_either_side_and_udp(tmp_path: Path) -> None:
    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            guest_port = server.getsockname()[1]
            threading.Thread(target=accept_all, args=(server, say_bye), daemon=True).start()
            unix = await asyncio.start_unix_server(echo, tmp_path / "guest.sock")
            udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            udp.bind(("127.0.0.1", 0))
            udp.setblocking(False)
            port, udp_port = free_port(), free_port()
            async with streams(tmp_path) as (_, _, mux):
                forwarder = forwarder_of(mux, f"{tmp_path}/host.sock:{guest_port}", f"{port}:{tmp_path}/guest.sock",
                                         f"{udp_port}:{udp.getsockname()[1]}/udp")
                forwarder.begin()
                assert await fetch(port, b"to a socket") == b"to a socket", "it needs no listener's report"
                forwarder.set_listeners([("127.0.0.1", guest_port)], [("127.0.0.1", udp.getsockname()[1])])
                assert (tmp_path / "host.sock").stat().st_mode & 0o777 == 0o600
                reader, writer = await asyncio.open_unix_connection(tmp_path / "host.sock")
                assert await reader.read() == b"bye"
                writer.close()
                client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_sendto(client, b"ping", ("127.0.0.1", udp_port))
                data, sender = await asyncio.wait_for(loop.sock_recvfrom(udp, 100), 5)
                await loop.sock_sendto(udp, data + b" pong", sender)
                assert await asyncio.wait_for(loop.sock_recv(client, 100), 5) == b"ping pong"
                forwarder.set_listeners([])
                assert not (tmp_path / "host.sock").exists()
                await forwarder.close()
                assert refused(port)
                client.close()
            udp.close()
            unix.close()

    drive(work)


def test_other_rules_leave_what_stays_the_same_undisturbed() -> None:
    async def work() -> None:
        guest = Guest()
        first, second, third = free_port(), free_port(), free_port()
        forwarder = PortForwarder(guest, rules=[parse_rule(f"{second}:{first}")])
        async with guest.listening("127.0.0.1", first, echo):
            forwarder.set_listeners([("127.0.0.1", first)])
            reader, writer = await asyncio.open_connection("127.0.0.1", second)
            writer.write(b"one")
            assert await reader.readexactly(3) == b"one"
            forwarder.set_rules([parse_rule("ignore:1"), parse_rule(f"{second}:{first}")])
            assert not refused(second)
            forwarder.set_rules([parse_rule(f"{third}:{first}")])
            assert refused(second) and await fetch(third, b"moved") == b"moved"
            forwarder.set_rules([])
            assert refused(third) and await fetch(first, b"home") == b"home"
            writer.write(b"two")
            assert await reader.readexactly(3) == b"two", "a connection outlives its rule"
            writer.close()
        await forwarder.close()

    drive(work)


def test_the_tunnel_is_back_after_sshd_was_killed(tmp_path: Path) -> None:
    """Spec 18: by SSH alone, every server process killed, within 10 s."""

    async def work() -> None:
        with running_sshd(tmp_path / "sshd") as sshd, socket.create_server(("127.0.0.1", 0)) as server:
            guest, host = server.getsockname()[1], free_port()
            threading.Thread(target=accept_all, args=(server, say_bye), daemon=True).start()
            ssh = SshConnection(sshd.target)
            await ssh.wait_ready(Deadline(30))
            forwarder = PortForwarder(ssh, rules=[parse_rule(f"{host}:{guest}")])
            forwarder.set_listeners([("127.0.0.1", guest)])
            assert await ask_for_end(host) == b"bye"
            sshd.stop()
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(ask_for_end(host), 15)
            sshd.start()
            began = time.monotonic()
            while True:
                try:
                    assert await ask_for_end(host) == b"bye"
                    break
                except ConnectionResetError:
                    assert time.monotonic() - began < 10
            assert time.monotonic() - began < 10
            await forwarder.close()
            await ssh.close()

    drive(work)

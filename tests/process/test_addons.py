"""Add-ons of a machine that is up, and the ports that they have on the host; the guest is played by the loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest

from qvm.errors import GuestError, PortTakenError, UsageError
from qvm.execresult import ExecResult
from qvm.filenames import Files
from qvm.guest.hostports import HostPortForwarder
from qvm.runtime.base import Guest, HostPort, ReadyCheck, Runtime, RuntimeContext
from qvm.runtime.stack import Stack
from qvm.supervisor import addons, publishing
from qvm.supervisor.addons import Addons
from qvm.supervisor.publishing import Publishing


class Echo:
    """A Dialer whose guest answers what it hears at any port."""

    def __init__(self) -> None:
        self.dialled: list[tuple[str, int]] = []

    async def open_tcp(self, host: str, port: int) -> Any:
        self.dialled.append((host, port))
        pipe: asyncio.Queue[bytes] = asyncio.Queue()

        async def recv(limit: int = 0) -> bytes:
            return await pipe.get()

        async def send(data: bytes) -> None:
            await pipe.put(data)

        async def send_eof() -> None:
            await pipe.put(b"")

        async def close() -> None:
            pipe.put_nowait(b"")

        return SimpleNamespace(recv=recv, send=send, send_eof=send_eof, close=close)

    async def open_unix(self, path: str) -> Any:
        raise GuestError("no sockets here")


def ask(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 5) as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(100), b""))


def test_a_port_of_the_host_reaches_another_of_the_guest() -> None:
    async def scenario() -> None:
        echo = Echo()
        first = HostPortForwarder("api", 6443, echo)
        port = first.start(wish=0, last=0)
        assert await asyncio.to_thread(ask, port) == b"hello"
        assert echo.dialled == [("127.0.0.1", 6443)]
        second = HostPortForwarder("api", 6443, echo)
        assert second.start(wish=0, last=port) != port  # taken: any other
        third = HostPortForwarder("api", 6443, echo)
        with pytest.raises(PortTakenError):
            third.start(wish=port, last=0)
        await first.close()
        await first.close()
        assert third.start(wish=0, last=port) == port  # free: the same again
        for forwarder in (second, third):
            await forwarder.close()
        with pytest.raises(ConnectionRefusedError):
            ask(port)

    asyncio.run(scenario())


class Below(Runtime):
    name = "below"
    summary = "a runtime"

    def __init__(self) -> None:
        self.said: list[str] = []

    async def provision(self, guest: Guest, context: RuntimeContext) -> None:
        self.said.append("provision")

    async def start(self, guest: Guest, context: RuntimeContext) -> None:
        self.said.append("start")

    async def stop(self, guest: Guest, context: RuntimeContext) -> None:
        self.said.append("stop")

    async def teardown(self, guest: Guest, context: RuntimeContext) -> None:
        self.said.append("teardown")

    async def version(self, guest: Guest, context: RuntimeContext) -> str:
        return f"{self.name} 1"

    def activate(self, context: RuntimeContext, *, switch: bool) -> list[str]:
        self.said.append(f"activate {sorted(context.host_ports)}")
        return [f"{self.name} is here"]

    def deactivate(self, context: RuntimeContext, *, remove: bool) -> list[str]:
        self.said.append(f"deactivate {remove}")
        return []


class Onto(Below):
    name = "onto"
    runs_on = ("below",)
    data_folders = (PurePosixPath("/var/lib/onto"),)
    failures = 0

    def host_ports(self, context: RuntimeContext) -> Sequence[HostPort]:
        return (HostPort("api", 6443),)

    def checks(self, context: RuntimeContext) -> Sequence[ReadyCheck]:
        async def answers(guest: Guest, context: RuntimeContext) -> bool:
            self.said.append("checked")
            return True

        return (ReadyCheck("onto", answers, "no hint"),)

    async def watch_ports(
        self, guest: Guest, context: RuntimeContext, publish: Callable[[Sequence[tuple[str, int]]], None]
    ) -> None:
        if self.failures < 1:
            self.failures += 1
            raise OSError("away for a moment")
        publish([("10.43.0.1", 8080)])
        await asyncio.sleep(3600)


class Link:
    def __init__(self) -> None:
        self.dialer = Echo()
        self.channel = SimpleNamespace(exec=self._exec)
        self.extra: list[Sequence[tuple[str, int]]] = []
        self.ignored: set[int] = set()
        self.commands: list[list[str]] = []

    async def _exec(self, argv: Sequence[str], **options: Any) -> ExecResult:
        self.commands.append(list(argv))
        return ExecResult(0, b"", b"")

    async def open_sockets(self, sockets: Sequence[Any]) -> None:
        assert list(sockets) == []

    def set_extra_listeners(self, ports: Sequence[tuple[str, int]]) -> None:
        self.extra.append(ports)

    def ignore_ports(self, ports: Sequence[int]) -> None:
        self.ignored |= set(ports)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A supervisor of a machine that is up, with a primary runtime; the add-on is in the record from now on."""
    monkeypatch.setenv("QVM_HOME", str(tmp_path))
    files = Files("dev")
    files.folder.mkdir(parents=True)
    below, onto, link = Below(), Onto(), Link()
    context = RuntimeContext("dev", tmp_path / "dev", tmp_path / "state", "ann")
    record = SimpleNamespace(config=SimpleNamespace(activate=True))
    monkeypatch.setattr(addons, "load_record", lambda profile: record)
    monkeypatch.setattr(addons, "load_stack", lambda config: Stack(below, [onto]))
    monkeypatch.setattr(addons, "runtime_context", lambda record: context)
    monkeypatch.setattr(publishing, "backoff", lambda **_: iter([0.01] * 100))
    supervisor = SimpleNamespace(
        profile="dev", record=record, runtime=Stack(below), context=context, versions=[],
        publishing=Publishing(files, Stack(below), context, link),  # type: ignore[arg-type]
        machine=lambda: SimpleNamespace(channel=link.channel),
    )
    supervisor.note_version = supervisor.versions.append
    return SimpleNamespace(supervisor=supervisor, below=below, onto=onto, link=link, files=files)


def test_an_addon_comes_stops_and_goes(machine: Any) -> None:
    async def scenario() -> None:
        supervisor = machine.supervisor
        await supervisor.publishing.open(lambda note: None, switch=True)
        machine.below.said.clear()
        acting = Addons(supervisor)
        answer = await acting.act("onto", "start")
        assert machine.onto.said == ["provision", "start", "checked", "activate ['api']"]
        assert machine.below.said == ["provision", "activate ['api']"]  # set as the add-on needs it; not started again
        assert machine.link.commands[0][-1] == "/var/lib/onto"
        port = answer["ports"]["api"]
        assert await asyncio.to_thread(ask, port) == b"hello" and machine.link.ignored == {6443}
        assert supervisor.versions == ["below 1, onto 1"] and "onto is here" in answer["notes"]
        while machine.link.extra[-1] != [("10.43.0.1", 8080)]:  # after the one time it was away
            await asyncio.sleep(0.01)
        machine.onto.said.clear()

        answer = await acting.act("onto", "stop")
        assert machine.onto.said == ["stop", "deactivate False"] and answer["ports"] == {}
        assert machine.link.extra[-1] == [] and supervisor.runtime.name == "below"
        with pytest.raises(ConnectionRefusedError):
            ask(port)

        assert (await acting.act("onto", "start"))["ports"]["api"] == port
        machine.onto.said.clear()
        await acting.act("onto", "reset")
        assert machine.onto.said[:4] == ["stop", "provision", "start", "checked"]
        machine.onto.said.clear()
        await acting.act("onto", "delete")
        assert machine.onto.said == ["teardown", "deactivate True"]
        assert machine.below.said[-2:] == ["provision", "activate []"]
        await supervisor.publishing.close()

    asyncio.run(scenario())


def test_what_is_not_there_cannot_be_stopped(machine: Any) -> None:
    with pytest.raises(UsageError):
        asyncio.run(Addons(machine.supervisor).act("other", "stop"))
    with pytest.raises(UsageError):
        asyncio.run(Addons(machine.supervisor).act("onto", "explode"))


def test_ports_are_the_same_at_the_next_start(machine: Any) -> None:
    async def once() -> int:
        publishing = Publishing(machine.files, Stack(machine.below, [machine.onto]),
                                replace(machine.supervisor.context), machine.link)
        await publishing.open(lambda note: None, switch=False)
        port = publishing.ports()["api"]
        await publishing.close()
        return port

    first = asyncio.run(once())
    assert asyncio.run(once()) == first
    machine.files.host_ports.write_text("not JSON")
    assert asyncio.run(once()) > 0

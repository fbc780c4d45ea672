"""The supervisor's way from nothing to ready, over the stub QEMU with qvm's real agent behind its sockets."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from qemu_place import stubs_in
from stub_qemu import write_stub

from qvm import paths
from qvm.config.model import Config
from qvm.config.ports import parse_rule
from qvm.filenames import Files
from qvm.instance.record import GuestUser, Record
from qvm.instance.store import find_run, load_record, save_record
from qvm.process import kill
from qvm.supervisor.core import Supervisor
from qvm.supervisor.ports import port_handlers
from qvm.units import GiB

IMAGE = "0123456789abcdef" * 4
RETRY = "QEMU hit a known defect of its version and ended; starting it once more"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


class Stage:
    """A QVM_HOME with one instance, made of the stub."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        binaries = folder / "bin"
        binaries.mkdir()
        write_stub(binaries)
        for name, value in (("QVM_HOME", "h"), ("QVM_CACHE_HOME", "c"), ("QVM_QEMU", "bin")):
            monkeypatch.setenv(name, str(folder / value))
        self._make_image()
        save_record(Record(
            uuid="8d0e3c50-54c5-4c5f-9d5c-5a3c7b1c2f10",
            config=Config(profile="p", cpus=1, memory=GiB, disk=GiB, root_disk=GiB, arch="x86_64", runtime="none",
                          accel="tcg", image="debian-13", hostname="p", activate=False),
            image_id=IMAGE, mac="52:54:00:00:00:01", user=GuestUser("ana", 1000, 1000, "/home/ana.guest"),
            ssh_port=free_port(), accel="tcg", created=0.0,
        ))
        self.files = Files("p")
        paths.ensure_private_dir(self.files.ssh_folder)
        self.files.ssh_host_key.with_suffix(".pub").write_text("ssh-ed25519 AAAA qvm\n")

    def _make_image(self) -> None:
        image = paths.cache_home() / "images" / IMAGE[:16]
        image.mkdir(parents=True)
        names = {"disk": "disk.raw", "kernel": "vmlinuz", "initrd": "initrd"}
        for name in names.values():
            (image / name).touch()
        manifest = {"version": 1, "id": IMAGE, "name": "debian-13", "arch": "x86_64", "files": names, "format": "raw",
                    "cmdline": "quiet"}
        (image / "manifest.json").write_text(json.dumps(manifest))

    def manners(self, words: str) -> None:
        self._monkeypatch.setenv("QVM_STUB", words)

    def machines(self) -> list[int]:
        """QEMU processes of this stage, at once."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if bytes(self.folder) in words and b"-nodefaults" in words and b"-uuid" in words:
                    found.append(int(entry.name))
        return found


@pytest.fixture
def stage(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    made = Stage(tmp_path_factory.mktemp("s"), monkeypatch)
    yield made
    run = find_run("p")
    if run is not None:
        kill(run.qemu, signal.SIGKILL)
    assert not stubs_in(made.folder), "a test left a process behind"


@asynccontextmanager
async def supervised() -> AsyncIterator[Supervisor]:
    supervisor = Supervisor("p")
    supervisor.begin()
    try:
        yield supervisor
    finally:
        if not supervisor.finished.is_set():
            await supervisor.stop(force=True)


async def outcome(supervisor: Supervisor) -> list[dict[str, Any]]:
    """Every event up to the one that settles the start."""
    seen: list[dict[str, Any]] = []
    async with asyncio.timeout(30):
        async for event in supervisor.bus.watch():
            seen.append(event)
            if event["event"] in ("ready", "failed", "stopped"):
                return seen
    raise AssertionError(f"the events ended: {seen}")


def notes(events: list[dict[str, Any]]) -> list[str]:
    return [event["text"] for event in events if event["event"] == "note"]


def test_from_nothing_to_ready_and_down(stage: Stage) -> None:
    async def work() -> None:
        stage.manners("guest")
        async with supervised() as supervisor:
            events = await outcome(supervisor)
            assert events[-1]["event"] == "ready"
            assert notes(events) == []
            assert set(supervisor.requirements.values()) == {"done"}
            assert await supervisor.stop(force=False) == "powerdown"
        assert find_run("p") is None

    asyncio.run(work())


def test_an_abort_by_chance_is_tried_once_more(stage: Stage) -> None:
    async def work() -> None:
        stage.manners("guest chance")
        async with supervised() as supervisor:
            events = await outcome(supervisor)
            assert events[-1]["event"] == "ready"
            assert notes(events) == [RETRY]
            begun = [event for event in events if event.get("name") == "qemu" and event.get("state") == "done"]
            assert len(begun) == 2, "QEMU was started twice"
            (pid,) = stage.machines()
            run = find_run("p")
            assert run is not None and run.ready and run.qemu.pid == pid
            log = stage.files.qemu_log.read_text()
            assert log.count(" -nodefaults ") == 2 and "iotlb_to_section: Assertion" in log

    asyncio.run(work())


def test_twice_is_no_chance(stage: Stage) -> None:
    async def work() -> None:
        stage.manners("guest chance-always")
        async with supervised() as supervisor:
            events = await outcome(supervisor)
            assert notes(events) == [RETRY]
            assert events[-1]["event"] == "failed"
            assert events[-1]["error"]["message"] == "QEMU ended while the guest was starting"
            assert "iotlb_to_section" in events[-1]["error"]["details"]
        assert stage.files.qemu_log.read_text().count(" -nodefaults ") == 2

    asyncio.run(work())


def test_another_crash_is_told_at_once(stage: Stage) -> None:
    async def work() -> None:
        stage.manners("guest crash")
        async with supervised() as supervisor:
            events = await outcome(supervisor)
            assert notes(events) == []
            assert events[-1]["event"] == "failed"
            assert "something_else" in events[-1]["error"]["details"]
        assert stage.files.qemu_log.read_text().count(" -nodefaults ") == 1

    asyncio.run(work())


@pytest.mark.parametrize("way", ["stop", "leave"])
def test_an_end_while_qemu_starts_leaves_no_qemu(stage: Stage, way: str) -> None:
    """The thread that starts QEMU cannot be interrupted; what it started then is nobody's."""
    async def work() -> None:
        stage.manners("slow guest")
        async with supervised() as supervisor:
            end = time.monotonic() + 10
            while not stage.machines():
                assert time.monotonic() < end
                await asyncio.sleep(0.01)
            await (supervisor.stop(force=True) if way == "stop" else supervisor.leave())
        assert stage.machines() == []
        assert find_run("p") is None

    asyncio.run(work())


def test_forwards_are_back_when_a_supervisor_takes_over(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub's guest is this host: its listener is forwarded to another port, and by rules changed while it runs."""

    async def no_disks(monitor: Any, files: Files) -> None:
        """The stub has none to look at, which is what a supervisor that adopts a machine does first."""

    monkeypatch.setattr("qvm.supervisor.core.take_up", no_disks)
    with socket.create_server(("127.0.0.1", 0)) as service:
        guest, host = service.getsockname()[1], free_port()
        record = load_record("p")
        config = replace(record.config, port_forwarder="none", port_forwards=(parse_rule(f"{host}:{guest}"),))
        save_record(replace(record, config=config))

        def reachable() -> bool:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", host)) != 0:
                    return False
            service.accept()[0].close()
            return True

        async def until(*, wanted: bool) -> float:
            began = time.monotonic()
            while await asyncio.to_thread(reachable) != wanted:
                assert time.monotonic() - began < 10
                await asyncio.sleep(0.01)
            return time.monotonic() - began

        async def work() -> None:
            stage.manners("guest")
            async with supervised() as first:
                assert (await outcome(first))[-1]["event"] == "ready"
                await until(wanted=True)
                await first.leave()
                await until(wanted=False)
            async with supervised() as second:
                assert (await outcome(second))[-1]["event"] == "ready"
                await until(wanted=True)
                ports = port_handlers(second)["ports"]

                async def send(message: dict[str, Any]) -> None:
                    raise AssertionError(message)

                assert (await ports({"rules": []}, send))["forwards"] == []
                await until(wanted=False)
                answer = await ports({"rules": [f"{host}:{guest}"]}, send)
                assert [entry["state"] for entry in answer["forwards"]] == ["forwarding"]
                assert [event["event"] for event in answer["events"]] == ["forwarding", "stopped", "forwarding"]
                await until(wanted=True)

        asyncio.run(work())

"""The conversation with a machine: large, flooded, cut off, fed with garbage; the other end is the stub QEMU."""

from __future__ import annotations

import asyncio
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu_place import UUID, Place, open_place

from qvm.errors import QemuError
from qvm.process import kill
from qvm.qemu.monitor import Monitor
from qvm.qemu.probe_monitor import probe_monitor


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    yield from open_place(tmp_path_factory.mktemp("q"), monkeypatch)


def with_monitor(place: Place, talk: Callable[[Monitor], Any], words: str = "") -> Any:
    identity = place.start(words)

    async def run() -> Any:
        monitor = await Monitor.connect(place.spec.monitor_socket, timeout=5)
        try:
            return await talk(monitor)
        finally:
            await monitor.close()

    result = asyncio.run(run())
    kill(identity, signal.SIGKILL)
    return result


def test_conversation(place: Place) -> None:
    async def talk(monitor: Monitor) -> None:
        assert (await monitor.uuid(), await monitor.status()) == (UUID, "running")
        assert await monitor.human("info usernet") == "you said info usernet\r\n"
        with pytest.raises(QemuError, match="no command nonsense"):
            await monitor.execute("nonsense")
        assert len(await monitor.execute("large", {"size": 8_000_000})) == 8_000_000
        answers = await asyncio.gather(*(monitor.execute("query-status") for _ in range(50)))
        assert len(answers) == 50 and monitor.is_open

    with_monitor(place, talk)


def test_a_command_that_is_never_answered(place: Place) -> None:
    async def talk(monitor: Monitor) -> None:
        with pytest.raises(QemuError, match=r"did not answer query-status within 0\.3 s"):
            await monitor.execute("query-status", timeout=0.3)

    with_monitor(place, talk, "later:deaf:query-status")


@pytest.mark.parametrize("words", ["later:babble:query-status", "later:die:query-status"])
def test_the_end_of_a_conversation_is_told_to_all(place: Place, words: str) -> None:
    async def talk(monitor: Monitor) -> None:
        waiting = [asyncio.create_task(monitor.wait_closed()) for _ in range(3)]
        events = asyncio.create_task(collect(monitor))
        with pytest.raises(QemuError, match="before it answered query-status"):
            await monitor.execute("query-status", timeout=5)
        hows = await asyncio.wait_for(asyncio.gather(*waiting), 5)
        assert len(set(hows)) == 1 and hows[0]
        assert await asyncio.wait_for(events, 5) == []
        assert not monitor.is_open
        with pytest.raises(QemuError):
            await monitor.status()

    with_monitor(place, talk, words)


async def collect(monitor: Monitor) -> list[str]:
    return [event["event"] async for event in monitor.events()]


def test_a_killed_qemu_closes_the_monitor(place: Place) -> None:
    async def talk(monitor: Monitor) -> str:
        kill(place.started[-1], signal.SIGKILL)
        return await asyncio.wait_for(monitor.wait_closed(), 5)

    assert "QEMU closed" in with_monitor(place, talk)


def test_a_cancelled_waiter_disturbs_nobody(place: Place) -> None:
    async def talk(monitor: Monitor) -> None:
        first = asyncio.create_task(monitor.wait_closed())
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert await monitor.status() == "running"
        await monitor.close()
        assert await asyncio.wait_for(monitor.wait_closed(), 1) == "closed"
        await monitor.close()

    with_monitor(place, talk)


@pytest.mark.parametrize("words", ["mute", "garbage", "deaf:qmp_capabilities"])
def test_connecting_to_a_sick_monitor(place: Place, words: str) -> None:
    async def connect(path: Path) -> None:
        with pytest.raises(QemuError, match=r"does not answer on|cannot talk to QEMU on"):
            await Monitor.connect(path, timeout=0.5)

    place.manners(words)
    with subprocess.Popen(place.bare_argv()) as child:
        try:
            while not (place.folder / "monitor").exists():
                time.sleep(0.01)
            asyncio.run(connect(place.folder / "monitor"))
        finally:
            child.kill()


def test_a_second_client_waits_in_vain_while_the_first_stays(place: Place) -> None:
    async def talk(monitor: Monitor) -> None:
        with pytest.raises(QemuError, match="does not answer"):
            await Monitor.connect(monitor.path, timeout=0.3)
        assert await asyncio.to_thread(probe_monitor, monitor.path, 0.3) is None
        assert await monitor.status() == "running"

    with_monitor(place, talk)


def test_a_flood_of_events_is_delivered_and_not_kept(place: Place) -> None:
    async def talk(monitor: Monitor) -> int:
        seen = 0

        def count(event: dict[str, Any]) -> None:
            nonlocal seen
            seen += 1

        with monitor.subscribed(count):
            await monitor.execute("flood", {"count": 200, "size": 10_000})  # buffers have their size now
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for _ in range(5):
                await monitor.execute("flood", {"count": 2000, "size": 10_000})
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 20_000, f"{grown} KiB more for 100 MB of events"
        return seen

    assert with_monitor(place, talk) == 10_200


def test_a_slow_reader_of_events_loses_the_oldest(place: Place) -> None:
    async def talk(monitor: Monitor) -> list[int]:
        numbers: list[int] = []
        reader = monitor.events()
        first = asyncio.ensure_future(anext(reader))
        await asyncio.sleep(0)
        await monitor.execute("flood", {"count": 3000, "size": 10})
        numbers.append((await first)["data"]["number"])
        while numbers[-1] != 2999:
            numbers.append((await anext(reader))["data"]["number"])
        await reader.aclose()  # type: ignore[attr-defined]
        return numbers

    numbers = with_monitor(place, talk)
    assert len(numbers) <= 1001 and numbers == sorted(numbers)


def test_a_bad_subscriber_disturbs_nobody(place: Place) -> None:
    async def talk(monitor: Monitor) -> None:
        def bad(event: dict[str, Any]) -> None:
            raise ValueError("bad subscriber")

        with monitor.subscribed(bad):
            await monitor.execute("flood", {"count": 3, "size": 1})
        assert await monitor.status() == "running"

    with_monitor(place, talk)


def test_unplugging_waits_for_the_guest(place: Place) -> None:
    async def talk(monitor: Monitor) -> None:
        await monitor.device_add("virtio-9p-pci", "mount7", bus="port0", fsdev="fs7", mount_tag="qvm7")
        await monitor.device_del("mount7", timeout=2)
        with pytest.raises(QemuError, match=r"did not let go of stuck1 within 0\.2 s"):
            await monitor.device_del("stuck1", timeout=0.2)
        with pytest.raises(QemuError, match="Device 'none1' not found"):
            await monitor.device_del("none1")
        waiting = asyncio.create_task(monitor.device_del("stuck2", timeout=10))
        await asyncio.sleep(0.1)
        kill(place.started[-1], signal.SIGKILL)
        with pytest.raises(QemuError, match="ended while stuck2"):
            await asyncio.wait_for(waiting, 5)

    with_monitor(place, talk)

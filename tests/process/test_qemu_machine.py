"""Starting and ending a machine: the stub QEMU on real sockets, hung, aborted, adopted, ended rung by rung."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu_place import UUID, Place, make_features, make_spec, open_place

from qvm.errors import HostError, InstanceStateError, PathTooLongError, PortTakenError, QemuError
from qvm.process import Identity, is_alive, kill
from qvm.qemu.machine import stop_qemu, wait_gone
from qvm.qemu.monitor import Monitor
from qvm.qemu.probe_monitor import MonitorInfo, probe_monitor


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    yield from open_place(tmp_path_factory.mktemp("q"), monkeypatch)


def test_start_returns_once_the_monitor_answers(place: Place) -> None:
    place.manners("slow")
    began = time.monotonic()
    identity = place.start("slow")
    assert 0.5 <= time.monotonic() - began < 5
    assert is_alive(identity)
    assert probe_monitor(place.spec.monitor_socket) == MonitorInfo(UUID, "running")


def test_everything_is_private(place: Place) -> None:
    place.start()
    paths = [place.spec.monitor_socket, place.spec.agent_socket, place.spec.stream_socket]
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o600] * 3
    assert all(path.is_socket() for path in paths)
    assert stat.S_IMODE(place.log.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.spec.serial_log.stat().st_mode) == 0o600


def test_the_command_line_is_in_the_log(place: Place) -> None:
    place.start()
    assert f"-uuid {UUID}" in place.log.read_text()


def test_stale_sockets_are_replaced(place: Place) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(place.spec.monitor_socket))
    place.spec.agent_socket.write_text("not even a socket")
    place.start()
    assert probe_monitor(place.spec.monitor_socket) is not None


def test_a_second_start_leaves_the_first_alone(place: Place) -> None:
    first = place.start()
    with pytest.raises(InstanceStateError, match="another QEMU already serves"):
        place.start()
    assert is_alive(first)
    assert probe_monitor(place.spec.monitor_socket) == MonitorInfo(UUID, "running")


def test_an_abort_is_told_in_its_own_words(place: Place) -> None:
    place.log.write_text("words of an earlier run\n")
    with pytest.raises(QemuError, match="signal 6") as caught:
        place.start("abort")
    assert "failed to set MSR 0x10a" in (caught.value.details or "")
    assert "earlier" not in (caught.value.details or "")
    assert caught.value.log_path == place.log


def test_a_taken_port_after_the_monitor_listens(place: Place) -> None:
    with pytest.raises(PortTakenError, match="40022") as caught:
        place.start("port-taken")
    assert caught.value.exit_code == 4
    assert not place.spec.monitor_socket.exists()


@pytest.mark.parametrize("words", ["mute", "garbage", "deaf:query-uuid"])
def test_one_that_never_answers_is_ended(place: Place, words: str) -> None:
    began = time.monotonic()
    with pytest.raises(QemuError, match=r"did not answer within 0\.6 s"):
        place.start(words, timeout=0.6)
    assert time.monotonic() - began < 3
    assert not place.spec.monitor_socket.exists()


def test_a_missing_binary(place: Place) -> None:
    place.features = make_features(place.folder / "gone")
    with pytest.raises(HostError, match=r"gone.* is not installed"):
        place.start()


def test_a_socket_path_that_is_too_long(place: Place) -> None:
    deep = place.folder / ("d" * 120)
    deep.mkdir()
    place.spec = make_spec(deep)
    with pytest.raises(PathTooLongError):
        place.start()


def test_large_logs_are_rotated(place: Place) -> None:
    place.spec.serial_log.write_bytes(b"old\n" * 2_000_000)
    place.start()
    assert place.spec.serial_log.stat().st_size < 1000
    assert place.spec.serial_log.with_name("serial.log.1").stat().st_size == 8_000_000


@pytest.mark.parametrize("words", ["mute", "garbage", "deaf:query-status", "babble:query-uuid", "die:query-uuid"])
def test_a_look_at_a_sick_monitor_is_short_and_none(place: Place, words: str) -> None:
    place.manners(words)
    with subprocess.Popen(place.bare_argv()) as child:
        try:
            while not (place.folder / "monitor").exists():
                time.sleep(0.01)
            began = time.monotonic()
            assert probe_monitor(place.folder / "monitor", timeout=0.4) is None
            assert time.monotonic() - began < 1
        finally:
            child.kill()


def test_a_look_at_nothing(place: Place) -> None:
    assert probe_monitor(place.folder / "nothing.sock") is None
    place.spec.monitor_socket.write_text("a file")
    assert probe_monitor(place.spec.monitor_socket) is None


def ladder(place: Place, words: str, **options: Any) -> tuple[str, float]:
    identity = place.start(words)

    async def stop() -> tuple[str, float]:
        monitor = await Monitor.connect(place.spec.monitor_socket)
        began = time.monotonic()
        rung = await stop_qemu(
            identity, monitor, powerdown_timeout=0.4, quit_timeout=0.4, term_timeout=0.4, **options
        )
        took = time.monotonic() - began
        await monitor.close()
        return rung, took

    rung, took = asyncio.run(stop())
    assert not is_alive(identity)
    return rung, took


@pytest.mark.parametrize(
    ("words", "rung"),
    [
        ("", "powerdown"),
        ("ignore-powerdown", "quit"),
        ("ignore-powerdown deaf:quit", "sigterm"),
        ("later:deaf:query-status", "sigterm"),
        ("deaf:system_powerdown ignore-term", "sigkill"),
        ("ignore-powerdown babble:quit ignore-term", "sigkill"),
        ("die:system_powerdown", "powerdown"),
        ("die:quit ignore-powerdown", "quit"),
    ],
)
def test_the_ladder(place: Place, words: str, rung: str) -> None:
    reached, took = ladder(place, words)
    assert reached == rung
    assert took < 5


def test_force_does_not_ask_the_guest(place: Place) -> None:
    assert ladder(place, "", force=True)[0] == "quit"


def test_a_paused_machine_is_woken_to_shut_down(place: Place) -> None:
    identity = place.start()

    async def stop() -> str:
        monitor = await Monitor.connect(place.spec.monitor_socket)
        await monitor.pause()
        assert await monitor.status() == "paused"
        return await stop_qemu(identity, monitor, powerdown_timeout=2)

    assert asyncio.run(stop()) == "powerdown"


def test_without_a_monitor_and_when_gone(place: Place) -> None:
    identity = place.start()
    assert asyncio.run(stop_qemu(identity, None)) == "sigterm"
    assert asyncio.run(stop_qemu(identity, None)) == "gone"


def test_an_adopted_process_is_ended_too(place: Place) -> None:
    """Started by another process, as by a supervisor that has died since."""
    place.manners("")
    program = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\n"
        "from qemu_place import make_features, make_spec\n"
        "from qvm.qemu.machine import start_qemu\n"
        "f = Path(sys.argv[1])\n"
        "i = start_qemu(make_spec(f), make_features(f / 'qemu-system-x86_64'), log=f / 'qemu.log')\n"
        "print(i.pid, i.started, i.marker)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(place.folder), str(Path(__file__).parent), str(Path(__file__).parents[2])],
        capture_output=True, text=True, check=True,
    )
    pid, started, marker = done.stdout.split()
    identity = Identity(int(pid), float(started), marker)
    place.started.append(identity)
    assert is_alive(identity)

    async def stop() -> str:
        monitor = await Monitor.connect(place.spec.monitor_socket)
        assert await monitor.uuid() == UUID
        return await stop_qemu(identity, monitor, powerdown_timeout=2)

    assert asyncio.run(stop()) == "powerdown"
    assert not is_alive(identity)


@pytest.mark.parametrize("with_pidfd", [True, False])
def test_the_end_is_noticed_at_once(place: Place, monkeypatch: pytest.MonkeyPatch, with_pidfd: bool) -> None:
    if not with_pidfd:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    identity = place.start()

    async def watch() -> float:
        assert not await wait_gone(identity, 0.1)
        asyncio.get_running_loop().call_later(0.2, kill, identity, signal.SIGKILL)
        began = time.monotonic()
        assert await wait_gone(identity, 5)
        return time.monotonic() - began

    assert asyncio.run(watch()) < (0.35 if with_pidfd else 0.8)
    assert not Path(f"/proc/{identity.pid}").exists(), "a zombie is left"

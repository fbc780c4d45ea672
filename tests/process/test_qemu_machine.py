"""Starting, talking to and ending a machine: the stub QEMU on real sockets, killed, hung, fed with garbage."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from stub_qemu import write_stub

from qvm.config.model import Mount
from qvm.errors import InstanceStateError, PathTooLongError, PortTakenError, QemuError
from qvm.instance.spec import Disk, InstanceSpec, KernelBoot
from qvm.process import Identity, is_alive, kill
from qvm.qemu.features import QemuFeatures
from qvm.qemu.machine import start_qemu, stop_qemu, wait_gone
from qvm.qemu.monitor import Monitor
from qvm.qemu.probe_monitor import MonitorInfo, probe_monitor
from qvm.units import GiB

UUID = "0b54d1c2-53b6-4f6e-8f0b-4d7d6f1f7a11"


def make_spec(folder: Path) -> InstanceSpec:
    return InstanceSpec(
        name="stub", uuid=UUID, arch="x86_64", accel="tcg", cpus=1, memory=GiB,
        disks=(Disk(folder / "root.qcow2", "root"),), mounts=(Mount(folder, PurePosixPath("/mnt")),),
        mac="52:54:00:00:00:01", ssh_port=40022, monitor_socket=folder / "qmp.sock", agent_socket=folder / "agent.sock",
        stream_socket=folder / "stream.sock", serial_log=folder / "serial.log",
        boot=KernelBoot(folder / "vmlinuz", folder / "initrd", "console=ttyS0"),
    )


def make_features(binary: Path) -> QemuFeatures:
    return QemuFeatures(
        binary=binary, build="stub", arch="x86_64", system="Linux", host_machine="x86_64", version=(7, 2, 0),
        package="", machine="pc-q35-7.2", accels=("tcg",), devices=("virtio-9p-pci",), properties=(), netdevs=("user",),
        sandbox=False, io_uring=False,
    )


class Place:
    """A folder for one machine, and the machine."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.spec = make_spec(folder)
        self.features = make_features(write_stub(folder))
        self.log = folder / "qemu.log"
        self.started: list[Identity] = []
        self._monkeypatch = monkeypatch

    def manners(self, words: str) -> None:
        self._monkeypatch.setenv("QVM_STUB", words)

    def start(self, words: str = "", *, timeout: float = 10.0) -> Identity:
        self.manners(words)
        identity = start_qemu(self.spec, self.features, log=self.log, timeout=timeout)
        self.started.append(identity)
        return identity


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("q"), monkeypatch)
    yield made
    for identity in made.started:
        kill(identity, signal.SIGKILL)
    assert not stubs_in(made.folder), "a test left a process behind"


def stubs_in(folder: Path) -> list[int]:
    """Processes whose command line names `folder`, zombies excluded."""
    found = []
    for _ in range(40):
        found = [
            int(entry.name) for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and int(entry.name) != os.getpid() and names(entry, folder)
        ]
        if not found:
            return []
        time.sleep(0.05)
    return found


def names(entry: Path, folder: Path) -> bool:
    try:
        return os.fsencode(folder) in (entry / "cmdline").read_bytes()
    except OSError:
        return False


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
    with pytest.raises(Exception, match=r"gone.* is not installed"):
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
    argv = [str(place.features.binary), "-uuid", UUID, *(
        word for name in ("agent", "stream", "monitor")
        for word in ("-chardev", f"socket,id={name},path={place.folder / name}")
    ), "-chardev", f"file,id=console,path={place.spec.serial_log}"]
    with subprocess.Popen(argv) as child:
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
        "from test_qemu_machine import make_features, make_spec\n"
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
    argv = [str(place.features.binary), *(
        word for name in ("agent", "stream", "monitor")
        for word in ("-chardev", f"socket,id={name},path={place.folder / name}")
    ), "-chardev", f"file,id=console,path={place.spec.serial_log}"]
    with subprocess.Popen(argv) as child:
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

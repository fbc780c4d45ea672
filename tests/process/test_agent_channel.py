"""The agent as a real process, spoken to by the real channel across what QEMU does between them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import time
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from agent_process import SOURCE, AgentProcess, PortBridge, drive, eventually, running

from qvm.errors import DeadlineError, GuestCommandError, GuestError
from qvm.guest.channel import AgentChannel
from qvm.guest.streams import StreamMux


def test_hello_names_the_agent(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (process, channel):
            assert channel.greeting is not None
            assert channel.greeting.pid == process.pid
            assert channel.greeting.digest == hashlib.sha256(SOURCE).hexdigest()
            assert channel.greeting.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            assert (await channel.wait_for_seed()).state == "absent"

    drive(work)


def test_host_may_speak_before_the_guest_has_booted(tmp_path: Path) -> None:
    async def work() -> None:
        process = AgentProcess(tmp_path)
        channel = AgentChannel()
        await channel.connect(process.control.path)
        greeting = asyncio.create_task(channel.hello(20))
        await asyncio.sleep(0.2)
        await process.start()
        assert (await greeting).pid == process.pid
        await channel.close()
        await process.kill()

    drive(work)


def test_exec_passes_everything_through(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (_, channel):
            result = await channel.exec(["sh", "-c", "cat; echo $WORD >&2; exit 3"], input=b"in\0put",
                                        env={"WORD": "ü"}, check=False)
            assert (result.exit_code, result.stdout, result.stderr) == (3, b"in\0put", "ü\n".encode())
            assert (await channel.exec(["pwd"], cwd="/usr")).stdout == b"/usr\n"
            assert (await channel.exec(["sh", "-c", "kill -9 $$"], check=False)).exit_code == 137
            missing = await channel.exec(["/no/such/program"], check=False)
            assert missing.exit_code == 127 and b"/no/such/program" in missing.stderr
            assert (await channel.exec(["/etc/passwd"], check=False)).exit_code == 126

    drive(work)


def test_exec_failures_are_errors_with_the_last_words(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (process, channel):
            with pytest.raises(GuestCommandError) as failed:
                await channel.exec(["sh", "-c", "echo why >&2; exit 7"])
            assert failed.value.details == "why" and "exit code 7" in failed.value.message
            began = time.monotonic()
            with pytest.raises(DeadlineError):
                await channel.exec(["sleep", "60"], timeout=0.3)
            assert time.monotonic() - began < 5
            await eventually(lambda: not process.children())

    drive(work)


def test_many_commands_at_once_and_large_data_both_ways(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (process, channel):
            data = os.urandom(5 << 20)
            before = len(process.fds())
            jobs = [channel.exec(["cat"], input=data), *(channel.exec(["sh", "-c", f"echo {n}"]) for n in range(30))]
            results = await asyncio.gather(*jobs)
            assert results[0].stdout == data
            assert [result.stdout for result in results[1:]] == [f"{n}\n".encode() for n in range(30)]
            # What the program does not read is dropped, and holds up nothing.
            assert (await channel.exec(["true"], input=data)).exit_code == 0
            await eventually(lambda: not process.children())
            await eventually(lambda: len(process.fds()) <= before)

    drive(work)


def test_output_nobody_reads_stops_only_its_program(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (process, channel):
            flood = channel.start_process(["sh", "-c", "yes; true"])
            await asyncio.sleep(0.3)
            began = time.monotonic()
            assert (await channel.exec(["echo", "hi"])).stdout == b"hi\n"
            assert time.monotonic() - began < 1
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096
            assert resident < 64 << 20
            flood.close()
            await eventually(lambda: not process.children())

    drive(work)


def test_process_streams_input_and_output(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (_, channel):
            process = channel.start_process(["sh", "-c", "while read line; do echo got $line; done"], stdin=True)
            output = aiter(process)
            for word in (b"one", b"two"):
                await process.write(word + b"\n")
                assert await anext(output) == ("out", b"got " + word + b"\n")
            process.write_eof()
            assert [item async for item in output] == []
            assert await process.wait() == 0
            waiting = channel.start_process(["sleep", "60"])
            waiting.send_signal(signal.SIGTERM)
            assert await waiting.wait() == 143

    drive(work)


def test_cancelling_kills_the_program(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (process, channel):
            task = asyncio.create_task(channel.exec(["sh", "-c", "sleep 60 & wait"]))
            await eventually(lambda: len(process.children()) == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await eventually(lambda: not process.children())

    drive(work)


def test_a_grandchild_holding_the_pipe_is_not_waited_for(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (_, channel):
            began = time.monotonic()
            result = await channel.exec(["sh", "-c", "sleep 3 & echo done"])
            assert result.stdout == b"done\n" and time.monotonic() - began < 2

    drive(work)


def test_write_file_is_atomic_and_tells_changes(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (_, channel):
            path = PurePosixPath(tmp_path / "made" / "on the way" / "file")
            assert await channel.write_file(path, b"one", mode=0o600)
            assert not await channel.write_file(path, b"one", mode=0o600)
            assert await channel.write_file(path, b"one", mode=0o640)
            big = os.urandom(3 << 20)
            assert await channel.write_file(path, big)
            assert Path(path).read_bytes() == big and Path(path).stat().st_mode & 0o777 == 0o644
            assert [each.name for each in Path(path).parent.iterdir()] == ["file"]
            with pytest.raises(GuestError, match="write_file"):
                await channel.write_file(PurePosixPath("/proc/nothing/here"), b"")

    drive(work)


def test_garbage_is_told_and_survived(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (_, channel):
            events: list[dict[str, Any]] = []
            channel.on_event = events.append
            assert channel._writer is not None
            channel._writer.write(b"\xff\x00 not json\n[1]\n{}\n" + b"x" * (5 << 20) + b"\n")
            assert (await channel.exec(["echo", "ok"])).stdout == b"ok\n"
            assert sum(event["event"] == "garbage" for event in events) >= 3
            with pytest.raises(GuestError, match="unknown operation"):
                await channel.request("no_such_thing")
            with pytest.raises(GuestError):
                await channel.request("mount")

    drive(work)


def test_a_new_host_takes_over_cleanly(tmp_path: Path) -> None:
    """The supervisor died in the middle of everything: half a line behind it, a command running, output on its way."""

    async def work() -> None:
        async with running(tmp_path) as (process, first):
            first.start_process(["sh", "-c", "yes"])
            sleeper = first.start_process(["sleep", "60"])
            await asyncio.sleep(0.1)
            assert first._writer is not None
            first._writer.write(b'{"id": 99, "op": "exec", "argv": ["tou')
            await first._writer.drain()
            first._writer.transport.abort()
            second = AgentChannel()
            await second.connect(process.control.path)
            await second.hello(20)
            assert (await second.exec(["echo", "mine"])).stdout == b"mine\n"
            await eventually(lambda: not process.children())
            with pytest.raises(GuestError):
                await sleeper.wait()
            await second.close()

    drive(work)


def test_a_restarted_agent_gets_a_new_session(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (process, channel):
            events: list[dict[str, Any]] = []
            channel.on_event = events.append
            await channel.watch_listeners()
            mux = StreamMux(channel)
            await mux.connect(process.streams.path)
            waiting = asyncio.create_task(channel.exec(["sleep", "60"]))
            await asyncio.sleep(0.1)
            await process.kill()
            await process.start()
            with pytest.raises(GuestError, match="restarted"):
                await waiting
            await eventually(lambda: any(event["event"] == "session" for event in events))
            assert (await channel.exec(["echo", "again"])).stdout == b"again\n"
            with pytest.raises(GuestError, match="refused"):
                await mux.open_tcp("127.0.0.1", 1)
            await mux.close()

    drive(work)


def test_update_replaces_the_agent_in_place(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, "--seed", "none") as (process, channel):
            assert not await channel.update(SOURCE)
            with pytest.raises(GuestError, match="SyntaxError"):
                await channel.update(b"def broken(:\n")
            newer = SOURCE + b"# newer\n"
            assert await channel.update(newer)
            assert channel.greeting is not None
            assert channel.greeting.digest == hashlib.sha256(newer).hexdigest()
            assert channel.greeting.pid == process.pid, "the same process, so that systemd sees no restart"
            assert (await channel.exec(["echo", "ok"])).stdout == b"ok\n"
            before = len(process.fds())
            assert await channel.update(SOURCE)
            await eventually(lambda: len(process.fds()) <= before)

    drive(work)


def test_listeners_are_pushed_within_300_ms(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (_, channel):
            await channel.watch_listeners()
            with socket.create_server(("127.0.0.1", 0)) as server, \
                 socket.create_server(("::1", 0), family=socket.AF_INET6) as six:
                wanted = {("127.0.0.1", server.getsockname()[1]), ("::1", six.getsockname()[1])}
                began = time.monotonic()
                await eventually(lambda: wanted <= set(channel.listeners))
                assert time.monotonic() - began < 0.6
            await eventually(lambda: not wanted & set(channel.listeners))

    drive(work)


def test_idle_agent_uses_next_to_no_time(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (process, channel):
            await channel.watch_listeners()
            await asyncio.sleep(0.5)

            def used() -> float:
                fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

            before = used()
            await asyncio.sleep(3)
            assert used() - before <= 0.06  # 2 % of a core, of which the clock's grain is 0.01 s

    drive(work)


def test_set_clock_leaves_a_right_clock_alone(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (_, channel):
            assert abs(await channel.set_clock()) < 1

    drive(work)


def test_channel_says_when_qemu_goes(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (process, channel):
            waiting = asyncio.create_task(channel.exec(["sleep", "60"]))
            await asyncio.sleep(0.05)
            assert process.control.client is not None
            process.control.client.shutdown(socket.SHUT_RDWR)
            assert "QEMU" in await channel.wait_closed()
            with pytest.raises(GuestError, match="closed"):
                await waiting
            with pytest.raises(GuestError, match="closed"):
                await channel.exec(["true"])

    drive(work)


def test_the_seed_is_applied_while_the_host_may_talk_and_reported(tmp_path: Path) -> None:
    async def work() -> None:
        (tmp_path / "root").mkdir()
        (tmp_path / "qvm.json").write_text('{"instance_id": "a", "hostname": "first", "env": {"WORD": "seen"}}')
        async with running(tmp_path, "--seed", str(tmp_path / "qvm.json")) as (_, channel):
            state = await channel.wait_for_seed()
            assert (state.state, state.errors) == ("applied", ()) and "hostname" in state.timings
            assert (tmp_path / "root/etc/hostname").read_text() == "first\n"
            assert (await channel.exec(["sh", "-c", "echo $WORD"])).stdout == b"seen\n"
            again = await channel.personalise({"instance_id": "b", "hostname": "fork"})
            assert again.state == "applied"
            assert (tmp_path / "root/etc/hostname").read_text() == "fork\n"

    drive(work)


def test_a_broken_seed_is_reported_and_leaves_the_agent_working(tmp_path: Path) -> None:
    async def work() -> None:
        (tmp_path / "qvm.json").write_text('{"instance_id": ')
        async with running(tmp_path, "--seed", str(tmp_path / "qvm.json")) as (_, channel):
            state = await channel.wait_for_seed()
            assert state.state == "failed" and "ValueError" in state.errors[0]
            assert (await channel.exec(["echo", "ok"])).stdout == b"ok\n"

    drive(work)


def test_hello_has_a_deadline(tmp_path: Path) -> None:
    async def work() -> None:
        bridge = PortBridge(tmp_path / "c.sock")
        channel = AgentChannel()
        await channel.connect(bridge.path)
        with pytest.raises(DeadlineError, match=r"0\.2 s"):
            await channel.hello(0.2)
        await channel.close()
        with pytest.raises(GuestError, match="cannot reach"):
            await AgentChannel().connect(tmp_path / "nobody.sock")

    drive(work)

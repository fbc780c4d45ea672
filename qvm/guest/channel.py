"""What the host can ask of the agent in a guest. The wire is `qvm.guest.wire`, the messages `qvm.guest.protocol`."""

from __future__ import annotations

import asyncio
import hashlib
import time
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from qvm.errors import DeadlineError, GuestCommandError, GuestError
from qvm.execresult import ExecResult
from qvm.guest.dial import Dialer
from qvm.guest.guestprocess import GuestProcess, TtySize
from qvm.guest.protocol import Hardware, Hello, MountUser, SeedState
from qvm.guest.wire import AgentWire, Event

_INLINE_INPUT = 64 << 10
_ANSWER_GRACE = 10.0
"""Seconds beyond its own deadline that the agent has to say so; generous, for software emulation."""


class AgentChannel(AgentWire):
    """Requests to the agent, many at once, and its events. Satisfies `qvm.runtime.base.Guest`.

    Use: make it in a running event loop, `connect`, `hello`, then anything. `on_event` is called from the loop with
    every event message of the session.
    """

    def __init__(self, on_event: Callable[[Event], None] | None = None) -> None:
        super().__init__(on_event)
        self.listeners: tuple[tuple[str, int], ...] = ()
        """Address and port of what listens for TCP in the guest, after `watch_listeners`."""
        self._stale_ids: tuple[str, ...] = ()
        self._seed = SeedState("pending")
        self._seed_done = asyncio.Event()
        self._watching = False
        self.session_hooks.append(self._watch_again)
        self.streams: Dialer | None = None
        """Byte streams beside this channel, while somebody has connected them."""

    async def exec(
        self,
        argv: Sequence[str],
        *,
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        check: bool = True,
        cwd: str | None = None,
        user: str | None = None,
    ) -> ExecResult:
        """Run `argv` to its end, as root or `user`, with its output captured.

        GuestCommandError on a non-zero exit when `check`; DeadlineError after `timeout` seconds (it is killed).
        """
        process = self.start_process(argv, input=input, env=env, timeout=timeout, cwd=cwd, user=user)
        output: dict[str, list[bytes]] = {"out": [], "err": []}
        late = f"{argv[0]} did not end within {timeout:g} s in the guest"
        try:
            async with asyncio.timeout(timeout + _ANSWER_GRACE):
                async for name, data in process:
                    output[name].append(data)
                code = await process.wait()
        except TimeoutError:
            raise DeadlineError(late) from None
        finally:
            process.close()
        result = ExecResult(code, b"".join(output["out"]), b"".join(output["err"]))
        if process.timed_out:
            raise DeadlineError(late, details=_tail(result))
        if check and code != 0:
            raise GuestCommandError(f"{' '.join(argv)[:200]} failed in the guest with exit code {code}",
                                    details=_tail(result))
        return result

    def start_process(
        self,
        argv: Sequence[str],
        *,
        stdin: bool = False,
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
        cwd: str | None = None,
        user: str | None = None,
        tty: TtySize | None = None,
    ) -> GuestProcess:
        """Start `argv`; with `stdin` its input stays open for `GuestProcess.write`. Close the process when done.

        With `user` (root too) it has the environment of a login; with `tty` it runs on a terminal of its own.

        A program that cannot be run ends with 127 or 126 and says why on its standard error, as in a shell.
        """
        data = input or b""
        inline = len(data) <= _INLINE_INPUT
        number = self._next_number()
        message: dict[str, Any] = {"id": number, "op": "exec", "argv": list(argv), "stdin": stdin or not inline,
                                   "env": dict(env or {}), "cwd": cwd, "user": user, "timeout": timeout,
                                   "tty": tty.to_dict() if tty is not None else None}
        if inline and data:
            message["input"] = b64encode(data).decode()
        self._send(message)
        process = self._processes[number] = GuestProcess(number, self._send, self._forget_process)
        if not inline:
            process.feed_in_background(data, eof=not stdin)
        return process

    async def write_file(
        self, path: PurePosixPath, data: bytes, *, mode: int = 0o644, owner: tuple[int, int] | None = None
    ) -> bool:
        """Write a file atomically, parents made; True where content, mode or owner differed from before."""
        extra = {"path": str(path), "mode": mode} | ({"owner": list(owner)} if owner else {})
        answer = await self._upload("write_file", data, extra)
        return bool(answer["changed"])

    async def send_file(
        self, source: Path, target: PurePosixPath, *, mode: int = 0o644, timeout: float = 600.0
    ) -> None:
        """Copy a file of the host's, however large, and put it in place atomically; parents are made.

        By `streams` where they are up, which carry many times as much. GuestCommandError where the guest cannot write
        it, DeadlineError after `timeout` seconds.
        """
        from qvm.guest.sending import send_file

        await send_file(self, self.streams, source, target, mode=mode, timeout=timeout)

    async def set_clock(self, *, timeout: float = 10.0) -> float:
        """Give the guest the host's time; returns by how many seconds it was off (differences < 50 ms are left)."""
        answer = await self.request("set_clock", time=time.time_ns(), timeout=timeout)
        return float(answer["off"]) / 1e9

    async def mount(
        self, tag: str, target: str | PurePosixPath, *, readonly: bool = False, mmap: bool = False,
        timeout: float = 60.0,
    ) -> bool:
        """Mount the 9p share `tag`, making the folder; True where it was not mounted yet. `mmap`: `Mount.mmap`."""
        answer = await self.request("mount", tag=tag, target=str(target), writable=not readonly, mmap=mmap,
                                    timeout=timeout)
        return bool(answer["changed"])

    async def umount(self, target: str | PurePosixPath, *, lazy: bool = False, timeout: float = 30.0) -> bool:
        """True where something was mounted there."""
        answer = await self.request("umount", target=str(target), lazy=lazy, timeout=timeout)
        return bool(answer["changed"])

    async def watch_mounts(self, targets: Sequence[str | PurePosixPath], *, timeout: float = 600.0) -> int:
        """Have what is mounted there watchable in the guest; returns how many files and folders that are."""
        wanted = [str(target) for target in targets]
        return int((await self.request("watch_mounts", targets=wanted, timeout=timeout))["held"])

    async def show_changes(self, paths: Sequence[str], gone: Sequence[str] = (), *, timeout: float = 60.0) -> int:
        """Have watchers in the guest notice changes of the host's; returns of how many paths they could."""
        answer = await self.request("changed", paths=list(paths), gone=list(gone), timeout=timeout)
        return int(answer["shown"])

    async def personalise(self, document: Mapping[str, Any], *, timeout: float = 60.0) -> SeedState:
        """Apply a seed document now; one with a `fork` section (`qvm.seed.render.fork_document`) makes a restored
        machine an instance of its own, with the host's clock of this moment.
        """
        wanted = dict(document)
        if "fork" in wanted:
            wanted["fork"] = {**wanted["fork"], "clock_ns": time.time_ns()}
        state = SeedState.from_message((await self.request("apply", document=wanted, timeout=timeout))["seed"])
        self._note_seed(state)
        self._stale_ids = state.stale
        return state

    @property
    def stale_ids(self) -> tuple[str, ...]:
        """Tracked ids that the last `personalise` could not replace in their programs' memory."""
        return self._stale_ids

    async def freeze(self, stage: str, *, timeout: float = 60.0) -> dict[str, float]:
        """Make the guest ready to be frozen, its disks written; the host pauses it next. Seconds by step.

        "runtime" and "base" (the data disk's driver let go) are of a machine that belongs to nobody, for which "ahead"
        has been asked before: that part needs no quiet machine. From one that is "running" for somebody, and is about
        to be copied, nothing is taken. GuestError where a step fails.
        """
        answer = await self.request("freeze", stage=stage, timeout=timeout)
        if stage in ("base", "runtime"):
            self._note_seed(SeedState("pending"))
        return {str(name): float(value) for name, value in answer["timings"].items()}

    async def track_id(self, name: str, *, file: str | PurePosixPath, process: str, timeout: float = 60.0) -> int:
        """Have the agent find where the processes called `process` keep the id (128 bits) that `file` holds.

        From then on each fork gets another one in both, with the rest of its identity. Returns the number of places;
        0 where the file holds none. To be asked again before each freeze.
        """
        answer = await self.request("track", name=name, file=str(file), process=process, timeout=timeout)
        return int(answer["found"])

    async def stir(self, entropy: bytes) -> None:
        """Make the guest's random numbers from now on unlike those of any machine that went on from the same state."""
        await self.request("stir", entropy=b64encode(entropy).decode(), timeout=30.0)

    async def grow(self, *, timeout: float = 600.0) -> tuple[str, ...]:
        """Grow root and data file systems to their disks' size, at low priority; returns the mount points that grew."""
        return tuple((await self.request("grow", timeout=timeout))["grown"])

    async def settle_hardware(self, cpus: int, memory_bytes: int, *, timeout: float = 30.0) -> Hardware:
        """Switch on CPUs and memory that were plugged in, waiting up to 10 s for them to come."""
        answer = await self.request("hardware", cpus=cpus, memory=memory_bytes, timeout=timeout)
        return Hardware(int(answer["cpus"]), int(answer["memory"]), bool(answer["complete"]))

    async def set_emulation(self, *, enabled: bool, timeout: float = 60.0) -> tuple[str, ...]:
        """Switch the guest's emulators for programs of other architectures on or off; returns the names of those that
        are on (`qvm.arch.Arch.binfmt`). Waits for their registration, which is the last thing at a boot."""
        return tuple((await self.request("emulation", enabled=enabled, timeout=timeout))["emulators"])

    async def find_mount_users(
        self, targets: Sequence[str | PurePosixPath], *, timeout: float = 60.0
    ) -> tuple[MountUser, ...]:
        """Who keeps these mounts from being unmounted, containers included; empty when nobody does."""
        answer = await self.request("mount_users", targets=[str(target) for target in targets], timeout=timeout)
        return tuple(MountUser.from_message(user) for user in answer["users"])

    async def wait_for_seed(self) -> SeedState:
        """Waits until the agent is through with the seed (user, keys, disks, mounts), well or not.

        GuestError where the channel ends before.
        """
        seed, end = asyncio.ensure_future(self._seed_done.wait()), asyncio.ensure_future(self.wait_closed())
        try:
            await asyncio.wait({seed, end}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            seed.cancel()
            end.cancel()
        if not self._seed_done.is_set():
            raise GuestError(f"the agent's channel is closed ({self.reason})")
        return self._seed

    async def watch_listeners(self) -> tuple[tuple[str, int], ...]:
        """From now on `listeners` events come and `listeners` is kept; the first event is this answer."""
        self._watching = True  # a new session, also one that begins right now, asks again
        answer = await self.request("listeners", timeout=30.0)
        self._on_event({"event": "listeners", "tcp": answer["tcp"], "udp": answer.get("udp", [])})
        return self.listeners

    async def begin_streams(self, marker: bytes) -> None:
        """Tell the agent that the stream port starts anew behind `marker`."""
        await self.request("streams", marker=b64encode(marker).decode(), timeout=30.0)

    async def shutdown(self, *, reboot: bool = False) -> None:
        """Ask the guest's init to go down; returns when it has been asked."""
        await self.request("shutdown", reboot=reboot, timeout=20.0)

    async def update(self, source: bytes, *, timeout: float = 60.0) -> bool:
        """Have the agent become `source` where it is another; a new session has begun when this returns True.

        GuestError where the agent refuses: it does not compile, or commands are running.
        """
        if self.greeting is not None and self.greeting.digest == hashlib.sha256(source).hexdigest():
            return False
        await self.wait_for_seed()
        self._restart = asyncio.get_running_loop().create_future()
        try:
            await self._upload("update", source, {})
            async with asyncio.timeout(timeout):
                await self._restart
        except TimeoutError:
            raise DeadlineError(f"the updated agent did not start within {timeout:g} s") from None
        finally:
            self._restart = None
        await self.hello(timeout)
        await self._begin_session()
        return True

    def _on_greeting(self, greeting: Hello) -> None:
        self._note_seed(greeting.seed)

    async def _watch_again(self) -> None:
        if self._watching:
            await self.watch_listeners()

    def _on_event(self, message: Event) -> None:
        if message["event"] == "listeners":
            self.listeners = tuple((str(address), int(port)) for address, port in message["tcp"])
        elif message["event"] == "seed":
            self._note_seed(SeedState.from_message(message))
        super()._on_event(message)

    def _note_seed(self, state: SeedState) -> None:
        self._seed = state
        if state.done:
            self._seed_done.set()
        else:
            self._seed_done.clear()  # the guest has rebooted


def _tail(result: ExecResult) -> str | None:
    text = (result.stderr or result.stdout).decode(errors="replace").strip()
    return "\n".join(text.splitlines()[-15:]) or None

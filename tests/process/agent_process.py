"""Runs the guest's agent as a process of this host, behind what stands in for QEMU's virtio-serial ports."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from port_bridge import PortBridge

from qvm.agentbundle import agent_source
from qvm.guest.channel import AgentChannel

SOURCE = agent_source()


class AgentProcess:
    def __init__(self, folder: Path, *options: str) -> None:
        self.control = PortBridge(folder / "c.sock")
        self.streams = PortBridge(folder / "s.sock")
        self.folder = folder
        self.file = folder / "agent.py"
        self.file.write_bytes(SOURCE)
        self.options = options or ("--seed", "none")
        self.pid = 0

    async def start(self) -> None:
        fds = [self.control.guest_end.fileno(), self.streams.guest_end.fileno()]
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", str(self.file), "--control", f"fd:{fds[0]}", "--streams", f"fd:{fds[1]}",
            "--root", str(self.folder / "root"), *self.options, pass_fds=fds)
        self.pid = self.process.pid

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    def fds(self) -> list[str]:
        found = []
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                found.append(str(link.readlink()))
            except FileNotFoundError:
                continue
        return found

    def children(self) -> list[str]:
        return Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()


@asynccontextmanager
async def running(folder: Path, *options: str) -> AsyncIterator[tuple[AgentProcess, AgentChannel]]:
    process = AgentProcess(folder, *options)
    await process.start()
    channel = AgentChannel()
    try:
        await channel.connect(process.control.path)
        await channel.hello(20)
        yield process, channel
    finally:
        await channel.close()
        await process.kill()
        process.control.close()
        process.streams.close()


def drive(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 60))


async def eventually(check: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "did not come about"
        await asyncio.sleep(0.01)

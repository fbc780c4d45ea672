"""Make a fork an instance of its own: the steps between a restored machine and one that is ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from qvm.errors import GuestError, NotReadyError, QemuError, QvmError
from qvm.filenames import Files
from qvm.guest.channel import AgentChannel
from qvm.image.disk import disk_info
from qvm.instance.record import Record
from qvm.log import get_logger
from qvm.qemu.monitor import Monitor
from qvm.runtime.base import Runtime, RuntimeContext
from qvm.runtime.trust import install_certificates
from qvm.seed.render import fork_document
from qvm.supervisor.assemble import build_seed
from qvm.supervisor.link import GuestLink
from qvm.supervisor.ready import start_runtime
from qvm.warm.request import BASE, RUNTIME
from qvm.warm.store import WarmImage

log = get_logger(__name__)

HELLO_TIMEOUT = 30.0
"""Seconds. It takes 0.1; a host that swaps may need more, but a guest that does not answer by then never will."""
IDENTITY_TIMEOUT = 60.0
GROW_DELAY = 1.0
"""Seconds after "ready" until the file systems grow to their disks: what the user asked for goes first."""

Tell = Callable[[str, str, float], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Fork:
    record: Record
    warm: WarmImage
    monitor: Monitor
    link: GuestLink
    runtime: Runtime
    context: RuntimeContext

    @property
    def channel(self) -> AgentChannel:
        return self.link.channel

    async def come_alive(self, tell: Tell) -> list[str]:
        """Let the guest run and make it this instance; returns notes.

        Raises NotReadyError naming the requirement that failed. Nothing of the user has run by then.
        """
        mark = Stopwatch(tell)
        await wake(self.link, self.monitor)
        mark.done("agent")
        await required("seed", self._become_own(), "the guest could not be given its identity")
        mark.done("seed")
        notes = await required("runtime", self._take_over_runtime(), "the runtime could not be taken over")
        await self.link.begin_service()
        if self.warm.stage == RUNTIME:
            self.link.rehearse(self.runtime.sockets)
        if self.runtime.name != "none":
            mark.done("runtime")
        return notes

    async def _become_own(self) -> None:
        document = fork_document(
            build_seed(self.record, self.runtime), uuid=self.record.uuid,
            data_disk="bind" if self.warm.stage == BASE else None,
        )
        extra = self.record.config.memory - int(self.warm.manifest["memory"])
        identity, _ = await asyncio.gather(
            self.channel.personalise(document, timeout=IDENTITY_TIMEOUT), self._plug_memory(extra)
        )
        if identity.state != "applied":
            raise GuestError("the guest could not be set up", details="\n".join(identity.errors))
        log.info("identity: %s", identity.timings)
        await install_certificates(self.channel, self.context.network, fresh=True)
        if extra:
            await self.channel.settle_hardware(self.record.config.cpus, self.record.config.memory)

    async def _plug_memory(self, size: int) -> None:
        if size > 0:
            await plug_memory(self.monitor, "dimm0", size)

    async def _take_over_runtime(self) -> list[str]:
        if self.warm.stage == RUNTIME:
            notes = await self.runtime.after_fork(self.channel, self.context)
            return list(notes or ())
        await start_runtime(self.runtime, self.channel, self.context)
        return []

    async def grow(self) -> None:
        """Have disks and file systems take the sizes of the profile; the guest runs meanwhile."""
        await asyncio.sleep(GROW_DELAY)
        files, config = Files(self.record.config.profile), self.record.config
        try:
            for node, path, size in (
                ("disk-root", files.root_disk, config.root_disk), ("disk-data", files.data_disk, config.disk),
            ):
                if await asyncio.to_thread(_virtual_size, path) < size:
                    await self.monitor.execute("block_resize", {"node-name": node, "size": size})
            await self.channel.grow()
        except QvmError:
            log.exception("the disks could not be grown; the next start does it")


async def plug_memory(monitor: Monitor, name: str, size: int) -> None:
    """Add `size` bytes of memory to a running machine, in one DIMM."""
    await monitor.object_add("memory-backend-ram", f"mem-{name}", size=size)
    try:
        await monitor.device_add("pc-dimm", name, memdev=f"mem-{name}")
    except QemuError:
        await monitor.object_del(f"mem-{name}")
        raise


def _virtual_size(path: Path) -> int:
    return disk_info(path).virtual_size


async def wake(link: GuestLink, monitor: Monitor) -> None:
    """Let a restored guest run, and wait for its agent; the greeting is in its device when it wakes up."""
    greeting = asyncio.ensure_future(link.greet(timeout=HELLO_TIMEOUT))
    try:
        await monitor.resume()
        await required("agent", greeting, "the restored guest does not answer")
    finally:
        greeting.cancel()


async def required(name: str, work: Awaitable[T], message: str) -> T:
    try:
        return await work
    except NotReadyError:
        raise
    except QvmError as error:
        raise NotReadyError(name, f"{message}: {error.message}", hint=error.hint, details=error.details) from error


class Stopwatch:
    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._last = time.monotonic()

    def done(self, name: str) -> None:
        now = time.monotonic()
        self._tell(name, "done", now - self._last)
        self._last = now

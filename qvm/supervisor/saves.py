"""What can be asked of a supervisor about saving its machine: suspend, snapshot, a copy for a clone, tidying up."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvm.errors import InstanceStateError, QemuError
from qvm.filenames import Files
from qvm.image.layers import data_disk, newest, read_header, remove_unused, root_disk
from qvm.image.merge import plan_merge
from qvm.instance.states import discard_state, take_mark, used_layers
from qvm.log import get_logger
from qvm.process import spawn_detached
from qvm.qemu.blocks import merge_into_top
from qvm.qemu.monitor import Monitor
from qvm.supervisor.control import Handler, Send
from qvm.supervisor.freezing import Freezer, Frozen, Machine

if TYPE_CHECKING:
    from qvm.supervisor.core import Supervisor

log = get_logger(__name__)

MERGE_TIMEOUT = 3600.0
"""Seconds for one layer; the machine runs meanwhile."""


class Saves:
    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._files = Files(supervisor.profile)
        self._one_at_a_time = asyncio.Lock()
        self._waiting = 0
        self._hurry = asyncio.Event()
        """Somebody wants to save: tidying lets go, and begins again afterwards."""
        self._tidying: asyncio.Task[None] | None = None

    async def suspend(self) -> Frozen:
        """Save the machine and end it, and the supervisor; QvmError where that failed: then it runs on."""
        async with self._saving() as machine:
            freezer = Freezer(machine, self._files.suspended, "suspended")
            disks = {"root": newest(root_disk(self._files)), "data": newest(data_disk(self._files))}

            def seal() -> None:
                freezer.seal(marks={name: take_mark(path) for name, path in disks.items()})
                settle_in_background(self._files.suspended)

            async with freezer.suspended(disks):
                await self._supervisor.end_saved(seal)
        log.info("suspended: %s", freezer.report)
        return freezer.report

    async def snapshot(self, name: str) -> Frozen:
        async with self._saving() as machine:
            return await self._save(machine, name, self._files.snapshots / name, sync=True)

    async def copy(self, name: str, folder: Path) -> Frozen:
        """Save this moment into `folder`, which is another instance's, for it to go on from."""
        async with self._saving() as machine:
            await self._supervisor.runtime.before_freeze(machine.channel, self._supervisor.context)
            await machine.channel.freeze("running")
            return await self._save(machine, name, folder, sync=False)

    async def _save(self, machine: Machine, name: str, folder: Path, *, sync: bool) -> Frozen:
        freezer = Freezer(machine, folder, name)
        await freezer.snapshot({"root": root_disk(self._files), "data": data_disk(self._files)}, sync=sync)
        settle_in_background(folder)
        log.info("saved %s: %s", name, freezer.report)
        return freezer.report

    async def forget(self, name: str) -> None:
        """Remove a snapshot, and in the background what only it needed."""
        await asyncio.to_thread(discard_state, self._files.snapshots / name)
        self._tidying = asyncio.create_task(self._tidy(), name="tidy")

    async def _tidy(self) -> None:
        done = False
        while not done:
            async with self._one_at_a_time:
                await self._supervisor.wait_grown()
                try:
                    done = await merge_running(self._supervisor.machine().monitor, self._files, stop=self._hurry)
                except InstanceStateError:  # it was suspended meanwhile
                    return
                except QemuError:
                    log.exception("layers could not be merged; the next time may do it")
                    return

    @asynccontextmanager
    async def _saving(self) -> AsyncIterator[Machine]:
        """One at a time, of a machine that is ready and has grown its disks."""
        self._waiting += 1
        self._hurry.set()
        try:
            await self._one_at_a_time.acquire()
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._hurry.clear()
        try:
            await self._supervisor.wait_grown()
            machine, network = self._supervisor.machine(), self._supervisor.services.network
            try:
                await network.leave()
                yield machine
            finally:
                await network.rejoin(machine.channel)
        finally:
            self._one_at_a_time.release()


async def merge_running(monitor: Monitor, files: Files, *, stop: asyncio.Event) -> bool:
    """Take out the layers that no saved state needs, as far as a running machine can; False where `stop` came first."""
    for name, disk in (("root", root_disk(files)), ("data", data_disk(files))):
        while (work := plan_merge(disk, used_layers(files.profile, name), running=True)) is not None:
            began, base = time.monotonic(), read_header(work.lower).backing
            if stop.is_set() or not await merge_into_top(monitor, name, base=base, timeout=MERGE_TIMEOUT, stop=stop):
                return False
            await asyncio.to_thread(work.lower.unlink)
            log.info("merged %s in %.2f s", work.lower.name, time.monotonic() - began)
        await asyncio.to_thread(remove_unused, disk, used_layers(files.profile, name))
    return True


def settle_in_background(folder: Path) -> None:
    spawn_detached([sys.executable, "-m", "qvm.instance.settle", str(folder)], log=None)


def saving_handlers(supervisor: Supervisor) -> dict[str, Handler]:
    saves = Saves(supervisor)

    async def suspend(request: dict[str, Any], send: Send) -> dict[str, Any]:
        return asdict(await saves.suspend())

    async def snapshot(request: dict[str, Any], send: Send) -> dict[str, Any]:
        return asdict(await saves.snapshot(str(request["name"])))

    async def copy(request: dict[str, Any], send: Send) -> dict[str, Any]:
        return asdict(await saves.copy(str(request["name"]), Path(request["folder"])))

    async def forget(request: dict[str, Any], send: Send) -> dict[str, Any]:
        await saves.forget(str(request["name"]))
        return {}

    return {"suspend": suspend, "snapshot": snapshot, "copy": copy, "forget": forget}

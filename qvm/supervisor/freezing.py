"""Save a machine that runs: to end it and go on later, or to have a copy of that moment while it runs on.

    held by nobody? -> mounts off -> sync ; RAM begun as link or copy, what has changed so far
      -> pause -> devices, changed RAM [-> layers] -> go on, or end -> state sealed

9p cannot be saved while it is mounted, so the mounts go first, and come again. What the guest has in memory and on its
disks belongs to one moment: the one it is paused in.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from qvm.arch import find_arch
from qvm.errors import GuestError, HostError, InstanceStateError, QvmError
from qvm.filenames import FIRMWARE_VARS, Files
from qvm.guest.channel import AgentChannel
from qvm.guest.mounts import ensure_mounts, order_mounts
from qvm.guest.protocol import MountUser
from qvm.image import layers
from qvm.image.layers import LayeredDisk
from qvm.image.store import Image
from qvm.instance import states
from qvm.instance.mounted import MountedFolder
from qvm.instance.record import Record, Run
from qvm.instance.states import SavedState, Shape
from qvm.log import get_logger
from qvm.qemu import blocks
from qvm.qemu.blocks import NewLayer
from qvm.qemu.features import QemuFeatures
from qvm.qemu.hostinfo import read_boot_id
from qvm.qemu.monitor import Monitor
from qvm.qemu.plug import Plugs
from qvm.qemu.probe import probe_qemu
from qvm.qemu.ram import can_read_memory, copy_sparse, save_changed
from qvm.qemu.ramchanges import SPAN_LIMIT, count_changed, link_open_file, save_changes
from qvm.qemu.shape import Block, RunningShape, host_address, open_file_of, read_shape, save_stream
from qvm.qemu.state import save_devices
from qvm.supervisor.assemble import build_spec, plugs_of
from qvm.supervisor.fitting import machine_digest, shape_spec

log = get_logger(__name__)

STREAM_TIMEOUT = 600.0
SYNC_TIMEOUT = 120.0


@dataclass(frozen=True, slots=True)
class Machine:
    """What is saved, and the ways to it."""

    record: Record
    image: Image
    run: Run
    monitor: Monitor
    channel: AgentChannel


@dataclass
class Frozen:
    """How it went, in seconds."""

    timings: dict[str, float] = field(default_factory=dict)
    paused: float = 0.0
    copied: int = 0
    """Bytes of RAM that were read while the machine stood still."""
    streamed: str | None = None
    """Why RAM had to be saved by QEMU itself, which takes longer."""


class Freezer:
    """One saving of one machine, into `folder` (a state's: `qvm.instance.states`)."""

    def __init__(self, machine: Machine, folder: Path, name: str) -> None:
        self.machine = machine
        self.folder = folder
        self.name = name
        self.report = Frozen()
        self._partial = folder
        self._addresses: dict[str, int] = {}
        self._linked: set[str] = set()
        """Ids of the blocks whose file is the very one they began with."""
        self._state: SavedState | None = None

    async def snapshot(self, disks: dict[str, LayeredDisk], *, sync: bool = True) -> SavedState:
        """Save this moment, disks included, and run on. QvmError where it failed: then nothing has happened."""
        machine = self.machine
        async with self._prepared(sync=sync) as (shape, features):
            tops = await asyncio.to_thread(lambda: {name: layers.frozen_name(disk) for name, disk in disks.items()})
            new = await asyncio.to_thread(lambda: {name: layers.add_layer(disks[name], top)
                                                   for name, top in tops.items()})
            self._mark("layers")
            began = time.monotonic()
            try:
                await machine.monitor.pause()
                self._mark("pause")
                await self._save(shape)
                on_top = [NewLayer(name, path) for name, path in new.items()]
                await blocks.put_on_top(machine.monitor, on_top, features)
                await self._settle_on(disks, new)
                self._mark("disks")
            finally:
                if machine.monitor.is_open:
                    await machine.monitor.resume()
                self.report.paused = time.monotonic() - began
            self._describe(shape, features, {name: top.name for name, top in tops.items()})
        return self.seal()

    @asynccontextmanager
    async def suspended(self, disks: dict[str, Path]) -> AsyncIterator[None]:
        """The machine is saved and stands still while the block runs, which ends it; `seal` then makes the state
        count. Where something fails it goes on."""
        machine = self.machine
        async with self._prepared(sync=True) as (shape, features):
            try:
                await machine.monitor.pause()
                self._mark("pause")
                await self._save(shape)
                self._describe(shape, features, {name: path.name for name, path in disks.items()})
                yield
            except BaseException:
                if machine.monitor.is_open:
                    await machine.monitor.resume()
                raise

    def seal(self, **changes: object) -> SavedState:
        assert self._state is not None
        self._state = replace(self._state, **changes)  # type: ignore[arg-type]
        states.seal_state(self.folder, self._state)
        self._mark("seal")
        return self._state

    @asynccontextmanager
    async def _prepared(self, *, sync: bool) -> AsyncIterator[tuple[RunningShape, QemuFeatures]]:
        """Everything that can be done while the machine still runs; undone in the end, or where it fails."""
        machine, config = self.machine, self.machine.record.config
        self._last = time.monotonic()
        arch = find_arch(config.arch)
        assert arch is not None, "validated when the record was made"
        features = await asyncio.to_thread(probe_qemu, arch)
        features.require_restore()
        shape = await read_shape(machine.monitor, config.arch)
        self.report.streamed = can_read_memory(machine.run.qemu.pid)
        self._partial = states.begin_state(self.folder)
        try:
            plugs = plugs_of(machine.monitor, machine.record)
            async with without_mounts(machine.channel, machine.run.mounts, plugs):
                self._mark("mounts")
                self._addresses = {block.id: await host_address(machine.monitor, block) for block in shape.blocks}
                work = [asyncio.create_task(self._save_ahead(shape))]
                if sync:
                    work.append(asyncio.create_task(self._sync()))
                try:
                    await asyncio.gather(*work)
                finally:
                    await asyncio.wait(work)  # a thread goes on whatever happens, and would fill what is given up
                self._last = time.monotonic()
                yield shape, features
        except BaseException:
            states.abandon_state(self.folder)
            raise
        self._mark("remount")

    def _bring_bases(self, shape: RunningShape) -> None:
        """Blocks of RAM that began as a file begin as that file where little has changed, else as a copy of it."""
        pid = self.machine.run.qemu.pid
        for block in shape.blocks:
            if block.file is None:
                continue
            source, target = open_file_of(pid, block.file), self._file_for(block)
            few = count_changed(pid, self._addresses[block.id], block.size) <= SPAN_LIMIT
            if few and link_open_file(source, target):
                self._linked.add(block.id)
            else:
                copy_sparse(source, target)

    def _file_for(self, block: Block) -> Path:
        return self._partial / (states.dimm_file(block.id) if block.id else states.RAM)

    async def _save(self, shape: RunningShape) -> None:
        monitor = self.machine.monitor
        devices = self._partial / states.DEVICES
        if self.machine.image.is_foreign:
            # What lies in flash is no part of the device state. What UEFI keeps in RAM of it must fit.
            variables = Files(self.machine.record.config.profile).firmware_vars
            await asyncio.to_thread(copy_sparse, variables, self._partial / FIRMWARE_VARS)
        if self.report.streamed is not None:
            await save_stream(monitor, devices, timeout=STREAM_TIMEOUT)
            self._mark("stream")
            return
        await save_devices(monitor, devices)
        self._mark("devices")
        self.report.copied = await self._save_ram(shape)
        self._mark("ram")

    async def _settle_on(self, disks: Mapping[str, LayeredDisk], new: Mapping[str, Path]) -> None:
        """Before the machine writes to them, power loss or not: the new layers are its disks."""
        try:
            await asyncio.to_thread(_switch_all, disks, new)
        except OSError as error:
            # Nothing has been written to them, so ending it now loses nothing on the disks; going on would.
            await self.machine.monitor.quit()
            raise HostError(f"the machine was ended, because its disks could not be recorded: {error.strerror}",
                            hint="free some space, and start it again") from error

    async def _sync(self) -> None:
        began = time.monotonic()
        await self.machine.channel.exec(["sync"], timeout=SYNC_TIMEOUT)
        self.report.timings["sync"] = round(time.monotonic() - began, 4)

    async def _save_ahead(self, shape: RunningShape) -> None:
        """Save what has changed so far while the machine runs: not to be relied on, but then the file has its blocks,
        and writing them a second time, with the machine paused, takes a fraction of the first."""
        if self.report.streamed is not None:
            return
        began = time.monotonic()
        await asyncio.to_thread(self._bring_bases, shape)
        copied = time.monotonic()
        await self._save_ram(shape)
        self.report.timings |= {"copy": round(copied - began, 4), "ahead": round(time.monotonic() - copied, 4)}

    async def _save_ram(self, shape: RunningShape) -> int:
        pid = self.machine.run.qemu.pid

        def save(block: Block) -> int:
            start, path = self._addresses[block.id], self._file_for(block)
            if block.id in self._linked:
                return save_changes(pid, start, block.size, states.changes_file(path))
            return save_changed(pid, start, block.size, path)

        return sum([await asyncio.to_thread(save, block) for block in shape.blocks])

    def _describe(self, running: RunningShape, features: QemuFeatures, disks: dict[str, str]) -> None:
        machine, record = self.machine, self.machine.record
        arch = find_arch(record.config.arch)
        assert arch is not None, "validated when the record was made"
        base, *dimms = running.blocks
        shape = Shape(running.cpus, base.size, running.mounts, tuple((dimm.id, dimm.size) for dimm in dimms))
        own = replace(build_spec(record, machine.image, arch), accel=machine.run.accel, mounts=())
        self._state = SavedState(
            name=self.name, created=time.time(), host_boot=read_boot_id(), disks=disks, shape=shape,
            machine=machine_digest(shape_spec(own, shape), features), accel=machine.run.accel,
            qemu=features.version_text, streamed=self.report.streamed is not None,
            runtime_version=machine.run.runtime_version,
        )

    def _mark(self, name: str) -> None:
        now = time.monotonic()
        self.report.timings[name] = round(now - self._last, 4)
        self._last = now


async def take_up(monitor: Monitor, files: Files) -> None:
    """Have a machine whose saving was interrupted go on: it may stand still, on layers that nobody has recorded."""
    for name, disk in (("root", layers.root_disk(files)), ("data", layers.data_disk(files))):
        path = await blocks.active_file(monitor, name)
        if path.parent == disk.folder and path != layers.newest(disk):
            log.warning("recording %s as what the machine writes to", path)
            await asyncio.to_thread(layers.switch, disk, path)
    if await monitor.status() in ("paused", "postmigrate"):
        await monitor.resume()


def _switch_all(disks: Mapping[str, LayeredDisk], new: Mapping[str, Path]) -> None:
    for name, path in new.items():
        layers.switch(disks[name], path)


@asynccontextmanager
async def without_mounts(
    channel: AgentChannel, mounts: Sequence[MountedFolder], plugs: Plugs
) -> AsyncIterator[None]:
    """No host folder is mounted or plugged in while the block runs; then they are again, where the guest answers.

    InstanceStateError, with everything mounted as before, where something in the guest holds one.
    """
    targets = [each.mount.target for each in reversed(order_mounts(mounts))]
    try:
        if targets:
            refuse_users(await channel.find_mount_users(targets))
            for target in targets:
                try:
                    await channel.umount(target)
                except GuestError as error:  # it began to be used just now
                    refuse_users(await channel.find_mount_users(targets))
                    raise InstanceStateError(f"{target} cannot be unmounted: {error.message}",
                                             hint="try again", details=error.details) from error
        there = await plugs.present() if any(each.device for each in mounts) else set()
        for each in mounts:
            if each.device in there:
                await plugs.unplug(each)
        yield
    finally:
        if channel.is_open:
            await _mount_again(channel, mounts, plugs)


async def _mount_again(channel: AgentChannel, mounts: Sequence[MountedFolder], plugs: Plugs) -> None:
    try:
        await plugs.plug_missing(mounts)
        await ensure_mounts(channel, mounts)
    except QvmError:
        log.exception("the host's folders could not be mounted again")


def refuse_users(users: Sequence[MountUser], what: str = "a machine cannot be saved") -> None:
    """InstanceStateError that names each process, its program and container, and what it holds."""
    if not users:
        return
    lines = [
        f"{user.target}: process {user.pid} ({user.comm})"
        f"{f' in container {user.container[:12]}' if user.container else ''} holds it by its {user.how}"
        for user in users
    ]
    first = users[0]
    where = f"container {first.container[:12]}" if first.container else f"process {first.pid} ({first.comm})"
    raise InstanceStateError(
        f"{what} while something in it uses a host folder: {where} uses {first.target}",
        hint="end it, or have it leave that folder, and try again", details="\n".join(lines),
    )

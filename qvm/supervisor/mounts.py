"""The control socket's `mounts`: host folders that come and go while the machine runs.

What is removed is unmounted in the guest and its device unplugged. A device that the machine was started with cannot
be: it is parked, and serves again where the same folder is mounted anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from qvm.config.model import Mount
from qvm.config.validate import find_source_problem
from qvm.errors import GuestError, InstanceStateError, QvmError
from qvm.guest.channel import AgentChannel
from qvm.guest.mounts import ensure_mounts, order_mounts
from qvm.instance.mounted import MountedFolder
from qvm.instance.store import save_run
from qvm.log import get_logger
from qvm.qemu.plug import Plugs, free_plug
from qvm.seed.iso import write_iso
from qvm.seed.render import render_seed
from qvm.supervisor.assemble import build_seed, plugs_of
from qvm.supervisor.control import Handler, Send
from qvm.supervisor.freezing import refuse_users

if TYPE_CHECKING:
    from qvm.supervisor.core import Supervisor

log = get_logger(__name__)


def describe_mounts(folders: Iterable[MountedFolder]) -> list[dict[str, Any]]:
    """For `status`: source, target, writable, type, state (mounted, broken) and reason."""
    rows = []
    for each in folders:
        if not each.parked:
            reason = find_source_problem(each.mount.source)
            rows.append({**each.mount.to_dict(), "type": each.kind, "state": "broken" if reason else "mounted",
                         "reason": reason or ""})
    return rows


@dataclass(frozen=True, slots=True)
class MountChange:
    """How to get from one list of folders to another. `moved` are inside what comes or goes: a mount on top would hide
    them, and they keep what is below from going."""

    gone: tuple[MountedFolder, ...]
    new: tuple[Mount, ...]
    moved: tuple[MountedFolder, ...]


def plan_change(now: Sequence[MountedFolder], wanted: Sequence[Mount]) -> MountChange:
    """Pure."""
    active = [each for each in now if not each.parked]
    gone = tuple(each for each in active if each.mount not in wanted)
    kept = [each for each in active if each.mount in wanted]
    new = tuple(mount for mount in wanted if mount not in [each.mount for each in kept])
    changing = [each.mount.target for each in gone] + [mount.target for mount in new]
    return MountChange(gone, new, tuple(
        each for each in kept if any(target in each.mount.target.parents for target in changing)
    ))


class Mounts:
    """The folders of one running machine; one change at a time."""

    def __init__(self, channel: AgentChannel, plugs: Plugs, folders: Sequence[MountedFolder]) -> None:
        self._channel = channel
        self._plugs = plugs
        self.folders = tuple(folders)

    async def become(self, wanted: Sequence[Mount], *, lazy: bool) -> list[str]:
        """Mount exactly `wanted`; returns notes. QvmError, with everything as it was, where that cannot be.

        `lazy`: what is in use is taken out of sight at once, and goes when its last user does.
        """
        before = self.folders
        change = plan_change(before, wanted)
        await self._take_away([*change.gone, *change.moved], lazy=lazy)
        added: list[MountedFolder] = []
        try:
            for mount in change.new:
                added.append(await self._provide(mount, [*before, *added]))
            await ensure_mounts(self._channel, [*change.moved, *added])
        except QvmError:
            await self._take_back(added, before)
            raise
        left, notes = [], []
        for folder in before:
            if folder in change.gone:
                parked, note = await self._let_go(folder, lazy=lazy)
                notes += note
                left += parked
            elif folder.tag not in {each.tag for each in added}:
                left.append(folder)
        self.folders = (*left, *added)
        return notes

    async def _take_away(self, folders: Sequence[MountedFolder], *, lazy: bool) -> None:
        """Unmount them, inner ones first; all or none."""
        inner_first = list(reversed(order_mounts(folders)))
        targets = [each.mount.target for each in inner_first]
        if targets and not lazy:
            refuse_users(await self._channel.find_mount_users(targets), "a folder cannot be unmounted")
        try:
            for target in targets:
                await self._umount(target, lazy=lazy)
        except QvmError:
            await ensure_mounts(self._channel, folders)
            raise

    async def _umount(self, target: PurePosixPath, *, lazy: bool) -> None:
        try:
            await self._channel.umount(target, lazy=lazy)
        except GuestError as error:
            refuse_users(await self._channel.find_mount_users([target]), "a folder cannot be unmounted")
            raise InstanceStateError(f"{target} cannot be unmounted: {error.message}", hint="try again, or --force",
                                     details=error.details) from error

    async def _provide(self, mount: Mount, taken: Sequence[MountedFolder]) -> MountedFolder:
        """A device for it: a parked one of the same folder, else one more."""
        for folder in taken:
            if folder.parked and (folder.mount.source, folder.mount.writable) == (mount.source, mount.writable):
                found = replace(folder, mount=mount, parked=False)
                await self._plugs.plug_missing([found])  # the guest may have let go of it meanwhile
                return found
        tag, device = free_plug(taken)
        folder = MountedFolder(mount, tag, device)
        await self._plugs.plug(folder)
        return folder

    async def _let_go(self, folder: MountedFolder, *, lazy: bool) -> tuple[list[MountedFolder], list[str]]:
        parked = [replace(folder, parked=True)]
        if not folder.device:
            return parked, [f"root of the VM could still reach {folder.mount.source} until the next start: a folder "
                            "that was mounted at the start is only unmounted"]
        if lazy:  # the guest's driver would wait for its last user
            return parked, []
        try:
            await self._plugs.unplug(folder)
        except QvmError as error:
            log.warning("%s stays plugged in: %s", folder.device, error)
            return parked, [f"{folder.mount.source} is unmounted, but the VM has not let go of its device"]
        return [], []

    async def _take_back(self, added: Sequence[MountedFolder], before: Sequence[MountedFolder]) -> None:
        """Have everything as it was, as far as that is possible."""
        try:
            for folder in reversed(order_mounts(added)):
                await self._channel.umount(folder.mount.target)
                if folder.device and folder.tag not in {each.tag for each in before}:
                    await self._plugs.unplug(folder)
            await ensure_mounts(self._channel, before)
        except QvmError:
            log.exception("mounts could not be put back")


async def mount_again(channel: AgentChannel, folders: Sequence[MountedFolder]) -> None:
    """After the guest alone has rebooted: it has mounted what its seed says, which may be out of date."""
    for folder in folders:
        if folder.parked:
            await channel.umount(folder.mount.target, lazy=True)  # whoever uses it already
    await ensure_mounts(channel, folders)


def mount_handlers(supervisor: Supervisor) -> dict[str, Handler]:
    one_at_a_time = asyncio.Lock()

    async def mounts(request: dict[str, Any], send: Send) -> dict[str, Any]:
        """`wanted`, where it is given, is what shall be mounted from now on; whoever asks keeps it for later starts."""
        notes: list[str] = []
        if "wanted" in request:
            async with one_at_a_time:
                wanted = tuple(Mount.from_dict(each) for each in request["wanted"])
                notes = await _change(supervisor, wanted, lazy=bool(request.get("lazy")))
        run = supervisor.run
        return {"mounts": describe_mounts(run.mounts if run else ()), "notes": notes}

    return {"mounts": mounts}


async def _change(supervisor: Supervisor, wanted: tuple[Mount, ...], *, lazy: bool) -> list[str]:
    machine = supervisor.machine()
    mounts = Mounts(machine.channel, plugs_of(machine.monitor, machine.record), machine.run.mounts)
    notes = await mounts.become(wanted, lazy=lazy)
    assert supervisor.run is not None
    supervisor.run = replace(supervisor.run, mounts=mounts.folders)
    save_run(supervisor.profile, supervisor.run)
    await supervisor.follow_changes()
    record = supervisor.record
    supervisor.record = replace(record, config=replace(record.config, mounts=wanted))
    # A fork that reboots starts from disk with what the seed says; the file QEMU has open now stays as it is.
    seed = render_seed(build_seed(supervisor.record, supervisor.runtime))
    await asyncio.to_thread(write_iso, seed, supervisor.files.seed)
    return notes

"""9p devices that come and go while the machine runs.

QEMU opens the folder of an `-fsdev` when a device is made for it, and gets no new `-fsdev` after its start. So every
machine has two of them (`devices.plug_sources`: writable and read-only) whose path is a link in the instance's folder:
it is pointed at the folder, and the device made. The next one finds the link pointing elsewhere; those before it
keep what they have open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qvm.arch import Bus
from qvm.errors import QemuError, UsageError
from qvm.instance.mounted import MountedFolder, plug_device, plug_tag
from qvm.qemu.bus import virtio
from qvm.qemu.devices import SPARE_PORTS, plug_source
from qvm.qemu.monitor import Monitor

PLACES = SPARE_PORTS - 1
"""The last spare port is for a card of the shared network (`netplug`)."""


@dataclass(frozen=True, slots=True)
class Plugs:
    """The places of one running machine into which 9p devices can be plugged."""

    monitor: Monitor
    bus: Bus
    link: Path
    """`InstanceSpec.plug_link` of that machine."""

    async def plug(self, folder: MountedFolder) -> None:
        """Make the device of `folder`; QemuError where QEMU cannot, e.g. because its source has gone."""
        await asyncio.to_thread(point_link, self.link, folder.mount.source)
        place = {"bus": f"port{folder.device.removeprefix('plug')}"} if self.bus == "pcie" else {}
        await self.monitor.device_add(
            virtio("9p", self.bus), folder.device, **place,
            fsdev=plug_source(writable=folder.mount.writable), mount_tag=folder.tag,
        )

    async def unplug(self, folder: MountedFolder) -> None:
        """QemuError where the guest does not let go of it."""
        await self.monitor.device_del(folder.device)

    async def plug_missing(self, folders: Iterable[MountedFolder]) -> None:
        """What a machine should have plugged in and has not, after it was started or has been saved."""
        there = await self.present()
        for folder in folders:
            if folder.device and not folder.parked and folder.device not in there:
                await self.plug(folder)

    async def present(self) -> set[str]:
        """Ids of all devices that were given one."""
        entries = await self.monitor.execute("qom-list", {"path": "/machine/peripheral"})
        return {str(entry["name"]) for entry in entries}


def point_link(link: Path, source: Path) -> None:
    partial = link.with_name(f"{link.name}.new")
    try:
        partial.unlink(missing_ok=True)
        partial.symlink_to(source)
        partial.replace(link)
    except OSError as error:
        raise QemuError(f"cannot make the link {link}: {error.strerror}") from error


def free_plug(folders: Iterable[MountedFolder]) -> tuple[str, str]:
    """Tag and device for one more; UsageError where there is no room."""
    taken = {folder.device for folder in folders}
    for number in range(PLACES):
        if plug_device(number) not in taken:
            return plug_tag(number), plug_device(number)
    raise UsageError(f"a running VM takes at most {PLACES} more mounts",
                     hint="mount a folder above them, or restart it: what is mounted at a start does not count")

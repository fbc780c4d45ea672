"""Which host folder a machine has under which tag now: it may differ from the profile's list once it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qvm.config.model import Mount

NINEP = "9p"


@dataclass(frozen=True, slots=True)
class MountedFolder:
    """A host folder that a running machine has been given."""

    mount: Mount
    tag: str
    """What the guest knows it by."""
    device: str = ""
    """The device that was plugged in for it; "": one that the machine was started with."""
    kind: str = NINEP
    parked: bool = False
    """Unmounted, with the device still there: one the machine was started with cannot be unplugged."""

    def to_dict(self) -> dict[str, Any]:
        return {**self.mount.to_dict(), "tag": self.tag, "device": self.device, "type": self.kind,
                "parked": self.parked}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MountedFolder:
        return cls(Mount.from_dict(data), str(data["tag"]), str(data["device"]), str(data["type"]),
                   bool(data["parked"]))


def mount_tag(number: int) -> str:
    """The tag of device number `number` of those a machine is started with; QEMU's command line uses the same."""
    return f"qvm{number}"


def plug_tag(number: int) -> str:
    """The tag of what is plugged in as number `number`."""
    return f"qvmplug{number}"


def plug_device(number: int) -> str:
    return f"plug{number}"


def plan_mounts(mounts: Sequence[Mount], slots: int) -> tuple[MountedFolder, ...]:
    """A machine's folders where it is started with `slots` devices: what is beyond them is to be plugged in."""
    return tuple(
        MountedFolder(mount, mount_tag(number)) if number < slots
        else MountedFolder(mount, plug_tag(number - slots), plug_device(number - slots))
        for number, mount in enumerate(mounts)
    )

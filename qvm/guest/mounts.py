"""The guest's side of the host's folders: mounting what it has been given, through the agent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Protocol

from qvm.instance.mounted import MountedFolder


class Mounter(Protocol):
    """What mounting needs of the channel (`AgentChannel`)."""

    async def mount(
        self, tag: str, target: str | PurePosixPath, *, readonly: bool = False, mmap: bool = False
    ) -> bool: ...


def order_mounts(mounts: Sequence[MountedFolder]) -> list[MountedFolder]:
    """In the order to mount them, outer folders before those inside them; without those that are parked."""
    return sorted((each for each in mounts if not each.parked), key=lambda each: len(each.mount.target.parts))


async def ensure_mounts(mounter: Mounter, mounts: Sequence[MountedFolder]) -> list[PurePosixPath]:
    """Mount what is not mounted yet; returns the targets that were not. GuestError with the kernel's reason.

    The agent does this by itself for the seed's mounts at boot; this makes sure of it, and serves hot-plugged ones.
    """
    return [
        each.mount.target
        for each in order_mounts(mounts)
        if await mounter.mount(each.tag, each.mount.target, readonly=not each.mount.writable, mmap=each.mount.mmap)
    ]

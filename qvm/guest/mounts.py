"""The guest's side of the host's folders: which 9p tag goes where, and making it so through the agent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

from qvm.config.model import Mount


@dataclass(frozen=True, slots=True)
class GuestMount:
    """One share as the guest sees it."""

    tag: str
    target: PurePosixPath
    writable: bool


class Mounter(Protocol):
    """What mounting needs of the channel (`AgentChannel`)."""

    async def mount(self, tag: str, target: str | PurePosixPath, *, readonly: bool = False) -> bool: ...


def mount_tag(number: int) -> str:
    """The 9p tag of mount number `number` in the instance's list; QEMU's command line uses the same."""
    return f"qvm{number}"


def order_mounts(mounts: Sequence[Mount]) -> list[GuestMount]:
    """In the order to mount them: outer folders before those inside them, tags by their place in the list."""
    named = [GuestMount(mount_tag(number), mount.target, mount.writable) for number, mount in enumerate(mounts)]
    return sorted(named, key=lambda mount: len(mount.target.parts))


async def ensure_mounts(mounter: Mounter, mounts: Sequence[Mount]) -> list[PurePosixPath]:
    """Mount what is not mounted yet; returns the targets that were not. GuestError with the kernel's reason.

    The agent does this by itself for the seed's mounts at boot; this makes sure of it, and serves hot-plugged ones.
    """
    return [
        mount.target
        for mount in order_mounts(mounts)
        if await mounter.mount(mount.tag, mount.target, readonly=not mount.writable)
    ]

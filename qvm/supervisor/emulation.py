"""Emulation of other architectures' programs in the guest (binfmt_misc): switched as the profile says, and known."""

from __future__ import annotations

import asyncio

from qvm.arch import platforms
from qvm.errors import QvmError
from qvm.guest.channel import AgentChannel
from qvm.log import get_logger

log = get_logger(__name__)


class Emulation:
    """Of one machine. Registration is the last and least part of a guest's boot: no start waits for it."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._task: asyncio.Task[None] | None = None
        self.platforms: list[str] | None = None
        """OCI platforms that run emulated; None until the guest has said."""

    def begin(self, channel: AgentChannel) -> None:
        self.end()
        self._task = asyncio.create_task(self._settle(channel), name="emulation")

    async def _settle(self, channel: AgentChannel) -> None:
        try:
            self.platforms = platforms(await channel.set_emulation(enabled=self._enabled))
        except QvmError as error:
            log.warning("emulation of other architectures is not known: %s", error)

    def end(self) -> None:
        """Stop asking; what the guest runs stays as it is."""
        if self._task is not None:
            self._task.cancel()
        self.platforms = None

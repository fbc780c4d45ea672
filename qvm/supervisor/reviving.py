"""Go on from a saved state: a suspended machine, a snapshot, a copy of another instance."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from qvm.agentbundle import agent_source
from qvm.errors import GuestError, InstanceStateError, QvmError
from qvm.filenames import Files
from qvm.guest.channel import AgentChannel
from qvm.guest.mounts import ensure_mounts
from qvm.image import layers
from qvm.instance import states
from qvm.instance.mounted import MountedFolder
from qvm.instance.record import Record
from qvm.instance.states import SavedState
from qvm.log import get_logger
from qvm.qemu.hostinfo import read_boot_id
from qvm.qemu.monitor import Monitor
from qvm.runtime.base import Runtime, RuntimeContext
from qvm.seed.render import fork_document
from qvm.supervisor.assemble import build_seed, plugs_of
from qvm.supervisor.forking import IDENTITY_TIMEOUT, Stopwatch, required, wake
from qvm.supervisor.link import GuestLink
from qvm.supervisor.ready import start_runtime

log = get_logger(__name__)

ENTROPY = 64
"""Bytes that a machine gets which may not be the only one to go on from its state."""


def find_suspended(profile: str) -> SavedState | None:
    """The state that the next start goes on from. InstanceStateError, with the reason, where it must not be used."""
    files = Files(profile)
    state = states.find_state(files.suspended)
    if state is None:
        return None
    disks = {"root": layers.newest(layers.root_disk(files)), "data": layers.newest(layers.data_disk(files))}
    flaw = states.find_flaw(files.suspended, state, host_boot=read_boot_id(), disks=disks)
    if flaw is not None:
        raise InstanceStateError(flaw)
    return state


@dataclass(frozen=True, slots=True)
class Revival:
    record: Record
    mounts: Sequence[MountedFolder]
    state: SavedState
    monitor: Monitor
    link: GuestLink
    runtime: Runtime
    context: RuntimeContext

    @property
    def channel(self) -> AgentChannel:
        return self.link.channel

    async def come_alive(self, tell: Callable[[str, str, float], None]) -> list[str]:
        """Let the guest run and have it as it was, or as an instance of its own; returns notes.

        Raises NotReadyError naming the requirement that failed.
        """
        mark = Stopwatch(tell)
        await wake(self.link, self.monitor)
        mark.done("agent")
        await required("clock", self._be_of_now(), "the guest could not be brought up to date")
        mark.done("clock")
        if self.mounts:
            await required("mounts", self._mount(), "a host folder could not be mounted")
            mark.done("mounts")
        await self.link.begin_service()
        if not self.state.renewed:
            self.link.rehearse(self.runtime.sockets)
        notes = await required("runtime", self._runtime(), "the runtime does not answer any more")
        if self.state.renewed:  # only now does it have ids of its own
            self.link.rehearse(self.runtime.sockets)
        if self.runtime.name != "none":
            mark.done("runtime")
        return notes

    async def _mount(self) -> None:
        await plugs_of(self.monitor, self.record).plug_missing(self.mounts)
        await ensure_mounts(self.channel, self.mounts)

    async def _be_of_now(self) -> None:
        if self.state.renewed:
            document = fork_document(build_seed(self.record, self.runtime), uuid=self.record.uuid)
            identity = await self.channel.personalise(document, timeout=IDENTITY_TIMEOUT)
            if identity.state != "applied":
                raise GuestError("the guest could not be set up", details="\n".join(identity.errors))
            return
        await self.channel.set_clock()
        await self._update_agent()
        if self.state.fresh:
            await self._stir()

    async def _stir(self) -> None:
        seed = secrets.token_bytes(ENTROPY)
        try:
            await self.channel.stir(seed)
        except GuestError as error:
            # An older agent that could not be replaced. The kernel takes this up within a minute, not at once.
            log.warning("new entropy goes in by the slow way: %s", error.message)
            await self.channel.exec(["sh", "-c", "cat >/dev/urandom"], input=seed)

    async def _update_agent(self) -> None:
        try:
            if await self.channel.update(agent_source()):
                log.info("the guest's agent was another version and has been replaced")
        except GuestError as error:
            log.warning("the guest's agent stays another version: %s", error.message)

    async def _runtime(self) -> list[str]:
        others = replace(self.context, sole=False)  # what it was copied from, at least
        notes = await self.runtime.after_fork(self.channel, others) if self.state.renewed else []
        if not await self._sockets_answer():
            async with asyncio.timeout(self.runtime.start_timeout):
                await start_runtime(self.runtime, self.channel, self.context)
        return list(notes or ())

    async def _sockets_answer(self) -> bool:
        """Whether somebody accepts at the runtime's socket: it was ready when it was frozen, so that is proof enough,
        and asking the guest's init takes an emulated guest half a second just after it was restored."""
        try:
            for socket in self.runtime.sockets[:1]:  # the others may be such that asking starts something
                connection = await self.link.streams.open_unix(str(socket.guest_path))
                await connection.close()
        except (QvmError, OSError) as error:
            log.info("the runtime is started anew: %s", error)
            return False
        return True


def explain(error: Exception) -> str:
    return error.message if isinstance(error, QvmError) else str(error) or type(error).__name__


"""The long-lived process of one instance: starts or adopts QEMU, makes it ready, serves it, and ends with it.

    go on, fork, boot or adopt  ->  requirements  ->  sockets, context, "ready"  ->  wait for QEMU's end or a request
                            |                                                  |
                            +--- failed: QEMU ended, logs kept                 +--- stop: ladder, context restored

A supervisor that is killed leaves QEMU running; the next command starts another one, which adopts it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from qvm.errors import InstanceStateError, NotReadyError, QvmError
from qvm.filenames import Files
from qvm.guest.bootwatch import PANIC_REQUIREMENT, PanicWatch
from qvm.guest.requirements import wait_until_ready
from qvm.guest.ssh import SshTarget
from qvm.image.store import Image, load_image
from qvm.instance.record import Record, Run
from qvm.instance.states import discard_remains, discard_state, keep_memory
from qvm.instance.store import clear_run, find_run, load_record, save_run
from qvm.log import get_logger
from qvm.logtail import tail_of
from qvm.qemu.machine import ended_by_chance, stop_qemu
from qvm.qemu.monitor import Monitor
from qvm.qemu.state import RestoreError
from qvm.runtime.stack import Stack, load_stack
from qvm.supervisor.bus import Bus
from qvm.supervisor.context import runtime_context
from qvm.supervisor.disks import undo_fork
from qvm.supervisor.forking import Fork
from qvm.supervisor.freezing import Machine, take_up
from qvm.supervisor.hostnetwork import agent_rules
from qvm.supervisor.hostwatch import HostWatch
from qvm.supervisor.launching import Launched, boot, connect_monitor, fork, revive
from qvm.supervisor.link import GuestLink
from qvm.supervisor.mounts import mount_again
from qvm.supervisor.publishing import Publishing
from qvm.supervisor.ready import ReadyParts, build_requirements, with_serial
from qvm.supervisor.reviving import Revival, explain, find_suspended
from qvm.supervisor.services import Services
from qvm.supervisor.usernet import QemuUserNetwork
from qvm.warm.fork import ForkPlan, find_plan
from qvm.warm.request import RUNTIME
from qvm.warm.store import discard_warm

log = get_logger(__name__)
T = TypeVar("T")

POWERDOWN_TIMEOUT = 90.0
"""Seconds the guest gets to shut down by itself; containers may take their own grace time."""

QEMU_END_PATIENCE = 0.5
"""Seconds in which a failure of the guest may turn out to be the end of its QEMU."""


class Supervisor:
    def __init__(self, profile: str) -> None:
        self.profile = profile
        self.files = Files(profile)
        self.bus = Bus()
        self.record: Record = load_record(profile)
        self.image: Image = load_image(self.record.image_id)
        self.runtime: Stack = load_stack(self.record.config)
        self.context = runtime_context(self.record)
        self.run: Run | None = None
        self.monitor: Monitor | None = None
        self.link: GuestLink | None = None
        self.publishing: Publishing | None = None
        self.watch: HostWatch | None = None
        self.requirements: dict[str, str] = {}
        self.phase = "starting"
        self._life: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[str] | None = None
        self._growing: asyncio.Task[None] | None = None
        self.services = Services(self.record, self.context.network)
        self.finished = asyncio.Event()

    def begin(self) -> None:
        self._life = asyncio.create_task(self._live(), name=f"life of {self.profile}")

    async def _live(self) -> None:
        try:
            await self._bring_up()
            while await self._serve_until_end():
                await self._begin_cold("the guest rebooted; a machine that was forked starts anew for that")
            await self._ended("QEMU ended by itself")
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever it was, the waiting command must hear it and QEMU must not stay
            await self._fail(error)

    async def _serve_until_end(self) -> bool:
        """Wait for QEMU's end; True where it was a reboot of the guest, which a fork cannot do by itself."""
        assert self.monitor is not None
        rebooted = False

        def see(event: dict[str, Any]) -> None:
            nonlocal rebooted
            if event.get("event") == "SHUTDOWN":
                rebooted = event.get("data", {}).get("reason") == "guest-reset"

        with self.monitor.subscribed(see):
            await self.monitor.wait_closed()
        return rebooted

    async def _bring_up(self) -> None:
        run = find_run(self.profile)
        if run is not None:
            log.info("adopting QEMU process %d", run.qemu.pid)
            self.run = run
            self.monitor = await connect_monitor(self.files, self.record.uuid)
            await take_up(self.monitor, self.files)
            await self._make_ready()
            return
        clear_run(self.profile)
        if await self._revive():
            return
        await asyncio.to_thread(discard_remains, self.files.suspended)
        if (plan := find_plan(self.files.fork_plan)) is not None and await self._fork(plan):
            return
        try:
            await self._boot()
        except NotReadyError as error:
            if error.requirement == PANIC_REQUIREMENT and self.record.accel == "tcg":
                await self._begin_cold(f"{error.message}; it is started once more")
            elif error.requirement == "qemu" and ended_by_chance(self.files.qemu_log):
                await self._begin_cold("QEMU hit a known defect of its version and ended; starting it once more")
            else:
                raise

    async def _begin_cold(self, why: str) -> None:
        """Start the machine from power off, in the place of one that has ended."""
        self.bus.publish("note", text=why)
        self.phase = "starting"
        await self._let_go()
        clear_run(self.profile)
        await self._boot()

    async def _boot(self) -> None:
        self._began(await boot(self.record, self.image))
        await self._make_ready()

    def _began(self, launched: Launched) -> None:
        self.run, self.monitor = launched.run, launched.monitor
        self.bus.publish("requirement", name="qemu", state="done", seconds=launched.seconds)

    async def _fork(self, plan: ForkPlan) -> bool:
        """Become a fork of the warm image and ready; False, with everything undone and said, where that failed."""
        began = time.monotonic()
        try:
            launched, warm = await fork(self.record, self.image, plan)
            self._began(launched)
            self.bus.publish("requirement", name="restore", state="done",
                             seconds=time.monotonic() - began - launched.seconds)
            parts = Fork(self.record, warm, launched.monitor, self._new_link(), self.runtime, self.context)
            self.requirements = dict.fromkeys(("agent", "seed", "runtime"), "waiting")
            notes = await self._unless_qemu_ends(parts.come_alive(self._on_requirement))
        except (QvmError, OSError) as error:
            await self._give_up_fork(plan, error)
            return False
        for note in notes:
            self.bus.publish("note", text=note)
        await self._publish_ready(warm.runtime_version if warm.stage == RUNTIME else None, fresh=True)
        self._growing = asyncio.create_task(parts.grow(), name="grow")
        return True

    async def _revive(self) -> bool:
        """Go on from the suspended state; False, said why, where there is none that can be used."""
        try:
            state = find_suspended(self.profile)
            if state is None:
                return False
            began = time.monotonic()
            launched = await revive(self.record, self.image, state)
            self._began(launched)
            self.bus.publish("requirement", name="restore", state="done",
                             seconds=time.monotonic() - began - launched.seconds)
            parts = Revival(self.record, launched.run.mounts, state, launched.monitor, self._new_link(), self.runtime,
                            self.context)
            self.requirements = dict.fromkeys(("agent", "clock", "mounts", "runtime"), "waiting")
            notes = await self._unless_qemu_ends(parts.come_alive(self._on_requirement))
        except (QvmError, OSError, TimeoutError) as error:
            await self._give_up_restored(f"the saved state could not be used ({explain(error)}): starting cold", error)
            await asyncio.to_thread(discard_state, self.files.suspended)
            return False
        await asyncio.to_thread(keep_memory, self.files.suspended)
        for note in notes:
            self.bus.publish("note", text=note)
        await self._publish_ready(state.runtime_version)
        return True

    async def _give_up_restored(self, why: str, error: Exception) -> None:
        """End a machine that was restored in vain, and say so."""
        log.error("%s", why, exc_info=error)
        self.bus.publish("note", text=why)
        run = self.run or find_run(self.profile)
        if run is not None:
            await stop_qemu(run.qemu, self.monitor, force=True)
        await self._let_go()
        self.run = self.monitor = self.link = None
        clear_run(self.profile)

    async def _give_up_fork(self, plan: ForkPlan, error: Exception) -> None:
        await self._give_up_restored(f"the warm image could not be used ({explain(error)}): starting cold", error)
        warm = plan.load()
        # Whatever else failed (a port taken, a mount that is gone) is not the warm image's fault.
        blamed = isinstance(error, RestoreError) or (
            isinstance(error, NotReadyError) and error.requirement in ("agent", "qemu")
        )
        if warm is not None and blamed:
            discard_warm(warm)
        await asyncio.to_thread(undo_fork, self.record, self.image, stage=plan.stage)

    async def _let_go(self) -> None:
        """Drop our hold on guest and monitor; whether QEMU lives does not matter here."""
        if self._growing is not None:
            self._growing.cancel()
            await asyncio.gather(self._growing, return_exceptions=True)
        self.services.end()
        watch, self.watch = self.watch, None
        for hold in (watch, self.publishing, self.link, self.monitor):
            if hold is not None:
                await hold.close()

    def _new_link(self) -> GuestLink:
        assert self.run is not None and self.monitor is not None
        target = SshTarget(
            self.run.ssh_port, self.record.user.name, self.files.ssh_key,
            self.files.ssh_host_key.with_suffix(".pub").read_text().strip(),
        )
        config = self.record.config
        self.link = GuestLink(
            self.files, target, publish=self.bus.publish, on_new_session=self._serve_again, rules=config.port_forwards,
            own_rules=agent_rules(config), port_forwarder=config.port_forwarder,
            user_network=QemuUserNetwork.of(self.monitor, pid=self.run.qemu.pid, ssh_port=self.run.ssh_port),
        )
        self.link.ignore_ports(self.runtime.private_ports)
        return self.link

    async def _make_ready(self) -> None:
        assert self.run is not None and self.monitor is not None
        link = self._new_link()
        said_hello = asyncio.ensure_future(link.open())
        parts = ReadyParts(self.record, link.channel, self.runtime, self.context, self.run.ssh_port,
                           self.files.serial_log, lambda it: self.bus.publish("note", text=it), self.run.mounts,
                           self.image.is_foreign)
        wanted = build_requirements(parts, agent=said_hello)
        self.requirements = {requirement.name: "waiting" for requirement in wanted}
        with PanicWatch(self.files.serial_log, self._on_phase if parts.foreign else None, self.monitor.quit):
            try:
                await self._unless_qemu_ends(wait_until_ready(wanted, self._on_requirement))
            finally:
                said_hello.cancel()
        await self._publish_ready(None)

    async def _publish_ready(self, version: str | None, *, fresh: bool = False) -> None:
        """Open to the host what is open to it, and say so. `version`: the runtime's, where it is known."""
        link = self.require_link()
        await self.services.settle(self.monitor, link.channel, fresh=fresh)
        self.publishing = Publishing(self.files, self.runtime, self.context, link)
        await self.publishing.open(lambda note: self.bus.publish("note", text=note), switch=self.record.config.activate)
        self.note_version(version or await self.runtime.version(link.channel, self.context))
        self.phase = "running"
        self.services.begin(link.channel)
        await self.follow_changes()
        self.bus.publish("ready")
        log.info("ready")

    async def follow_changes(self) -> None:
        """Have the guest's watchers hear of changes in what is mounted now, where that is wished."""
        if self.record.config.mount_inotify and self.run is not None and self.link is not None:
            if self.watch is None:
                self.watch = HostWatch(self.link.channel, lambda text: self.bus.publish("note", text=text))
            await self.watch.follow(self.run.mounts)

    def note_version(self, version: str) -> None:
        """Every requirement holds, of a runtime of that version."""
        assert self.run is not None
        self.run = replace(self.run, runtime_version=version, ready=True)
        save_run(self.profile, self.run)

    async def _serve_again(self) -> None:
        """The guest rebooted or its agent crashed: what is not enabled at its boot is started once more."""
        link = self.require_link()
        await link.channel.wait_for_seed()
        await mount_again(link.channel, self.run.mounts if self.run else ())
        await self.runtime.provision(link.channel, self.context)
        await self.runtime.start(link.channel, self.context)
        await self.services.settle(self.monitor, link.channel)
        self.services.begin(link.channel)
        await self.follow_changes()
        self.bus.publish("note", text="the guest started anew")

    async def _unless_qemu_ends(self, work: Awaitable[T]) -> T:
        assert self.monitor is not None
        return await self.monitor.unless_closed(work, lambda: NotReadyError(
            "qemu", "QEMU ended while the guest was starting", hint="see `qvm logs supervisor` and `qvm logs serial`",
            details=tail_of(self.files.qemu_log) or None, log_path=self.files.qemu_log,
        ), patience=QEMU_END_PATIENCE)  # fmt: skip

    def _on_requirement(self, name: str, state: str, seconds: float) -> None:
        self.requirements[name] = state
        self.bus.publish("requirement", name=name, state=state, seconds=seconds)

    def _on_phase(self, name: str, state: str, seconds: float) -> None:
        self.bus.publish("requirement", name=name, state=state, seconds=seconds)

    async def _fail(self, error: Exception) -> None:
        log.error("failed", exc_info=error)
        known = error if isinstance(error, QvmError) else QvmError(
            f"the supervisor failed: {error!r}", hint="this is a defect in qvm", log_path=self.files.supervisor_log
        )
        self.phase = "failed"
        await self._end_qemu(force=True)
        await self._ended("failed", error=with_serial(known, self.files.serial_log))

    async def stop(self, *, force: bool) -> str:
        """Stop the machine and, with it, this supervisor; returns the rung of the ladder that did it.

        A second call waits for the first; a forced one does not: it kills at once.
        """
        if self._stopping is None or force:
            self._stopping = asyncio.create_task(self._stop(force=force))
        return await asyncio.shield(self._stopping)

    async def _stop(self, *, force: bool) -> str:
        self.phase = "stopping"
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
        how = await self._end_qemu(force=force)
        await self._ended(how)
        return how

    def machine(self) -> Machine:
        """What there is to save; InstanceStateError where the instance is not up."""
        if self.phase != "running" or self.run is None or self.monitor is None:
            raise InstanceStateError(f"{self.profile!r} is {self.phase}; only one that runs can be saved")
        return Machine(self.record, self.image, self.run, self.monitor, self.require_link().channel)

    async def wait_grown(self) -> None:
        """Until the disks of a fork have the sizes of its profile."""
        if self._growing is not None:
            await asyncio.gather(self._growing, return_exceptions=True)

    async def end_saved(self, seal: Callable[[], None]) -> None:
        """End QEMU, whose machine has been saved, and this supervisor with it; `seal` runs when QEMU has gone."""
        self.phase = "stopping"
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
        await self._end_qemu(force=True)
        try:
            await asyncio.to_thread(seal)
        finally:
            await self._ended("suspend")

    async def _end_qemu(self, *, force: bool) -> str:
        run = self.run or find_run(self.profile)  # the latter where we were interrupted right behind its start
        if run is None:
            return "was not running"
        if not force and self.link is not None:
            await self.link.ask_shutdown()
        how = await stop_qemu(run.qemu, self.monitor, powerdown_timeout=POWERDOWN_TIMEOUT, force=force)
        log.info("QEMU ended by %s", how)
        return how

    async def _ended(self, how: str, *, error: QvmError | None = None) -> None:
        """QEMU has gone: put the host back as it was, tell the watchers, and let the process end."""
        await self._let_go()
        await asyncio.to_thread(self.runtime.deactivate, self.context, remove=False)
        await asyncio.to_thread(discard_remains, self.files.suspended)
        clear_run(self.profile)
        self.services.network.forget()
        if error is not None:
            self.bus.publish("failed", error=error.to_dict())
        else:
            self.bus.publish("stopped", how=how)
        self.bus.close()
        self.finished.set()

    async def leave(self) -> None:
        """Go without QEMU (we were asked to end, not the machine): it runs on and can be adopted."""
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
        await self._let_go()
        self.finished.set()

    def require_link(self) -> GuestLink:
        """The hold on a guest whose agent has answered; InstanceStateError before that."""
        if self.link is None or self.requirements.get("agent") != "done":
            raise InstanceStateError(f"the guest of {self.profile!r} does not answer yet")
        return self.link

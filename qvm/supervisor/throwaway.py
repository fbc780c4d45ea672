"""The machine of one `qvm run`: in this process, for one command, leaving nothing.

There is no record, no supervisor and no port. QEMU dies with this process, however that ends (`keeper`), and its folder
is removed as soon as QEMU has everything in it open. The modules that a conversation with the guest needs are
loaded while QEMU starts, which takes as long.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvm.errors import GuestError, QemuError, QvmError
from qvm.supervisor.keeper import Keeper, Started
from qvm.supervisor.runplan import RunPlan, seed_data

if TYPE_CHECKING:
    from qvm.guest.channel import AgentChannel
    from qvm.guest.guestprocess import GuestProcess, TtySize
    from qvm.guest.protocol import SeedState
    from qvm.qemu.monitor import Monitor
    from qvm.runtime.base import Runtime, RuntimeContext
    from qvm.warm.store import WarmImage

QEMU_TIMEOUT = 30.0
"""Seconds until QEMU's monitor answers. It takes 0.1; a loaded host may swap."""
FORK_HELLO_TIMEOUT = 30.0
BOOT_TIMEOUT = 240.0
FOREIGN_BOOT_TIMEOUT = 1200.0
SETUP_TIMEOUT = 120.0
_END_PATIENCE = 5.0
"""Seconds that QEMU may take to end after its sockets have closed: it gives its memory back in between."""


class RestoreFailedError(QvmError):
    """The warm image did not come to life; a cold start may."""

    code = "restore-failed"

    def __init__(self, warm: Path, error: QvmError) -> None:
        super().__init__(f"the warm image could not be used ({error.message})", hint=error.hint, details=error.details)
        self.warm = warm


class _SetupError(GuestError):
    """What was wished for cannot be had, forked or booted."""


class Machine:
    """A started machine; `launch` makes it and ends it."""

    def __init__(self, plan: RunPlan, started: Started, began: float) -> None:
        self.plan = plan
        self.timings: dict[str, float] = {}
        """Seconds: spawn, restore (or boot), agent, personalise, mounts (part of it, told by the guest), runtime."""
        self.pid = started.qemu.child.pid
        self._warm = started.warm
        self._folder = started.folder
        self._qemu = started.qemu
        self._log = started.log
        self._last = began
        self._channel: AgentChannel | None = None
        self._monitor: Monitor | None = None

    @property
    def channel(self) -> AgentChannel:
        assert self._channel is not None, "brought up before"
        return self._channel

    def done(self, name: str) -> None:
        """Note that `name` took the time since the last note."""
        now = time.monotonic()
        self.timings[name] = now - self._last
        self._last = now

    async def bring_up(self, env: Mapping[str, str]) -> None:
        """Until commands can run in it, with `env` for each of them.

        Raises RestoreFailedError where the warm image is to blame, else what went wrong; nothing of the user has run.
        """
        from qvm.guest.channel import AgentChannel
        from qvm.qemu.features import QemuFeatures

        self._channel = AgentChannel()
        monitor = await self._connect_monitor()
        self.done("spawn")
        if self._warm is None:
            await monitor.unless_closed(self._boot(), self._ended_early)
        else:
            try:
                features = QemuFeatures.from_dict(self.plan.features)
                await monitor.unless_closed(self._fork(self._warm, features, env), self._ended_early)
            except _SetupError:
                raise
            except QvmError as error:
                raise RestoreFailedError(self._warm.folder, error) from error
        await self._settle(monitor)
        self._folder.vanish()

    async def _connect_monitor(self) -> Monitor:
        import asyncio

        from qvm.qemu.monitor import Monitor
        from qvm.wait import Deadline, backoff

        deadline = Deadline(QEMU_TIMEOUT, "QEMU's start")
        for pause in backoff(first=0.002, most=0.02):
            if self._folder.monitor_socket.exists():
                try:
                    self._monitor = await Monitor.connect(self._folder.monitor_socket, timeout=deadline.left)
                    return self._monitor
                except QemuError:  # bound and not listening yet, or QEMU has ended: the next look tells
                    if deadline.passed:
                        raise
            if self._qemu.child.poll() is not None:
                raise self._ended_early()
            deadline.check()
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    async def _fork(self, warm: WarmImage, features: Any, env: Mapping[str, str]) -> None:
        import asyncio

        from qvm.seed.render import fork_document
        from qvm.warm.fork import restore_fork

        assert self._monitor is not None
        await restore_fork(self._monitor, warm, features)
        self.done("restore")
        await self.channel.connect(self._folder.agent_socket)
        greeting = asyncio.ensure_future(self.channel.hello(timeout=FORK_HELLO_TIMEOUT))
        try:
            await self._monitor.resume()
            await greeting
        finally:
            greeting.cancel()
        self.done("agent")
        document = fork_document(seed_data(self.plan, env))
        identity, _ = await asyncio.gather(
            self.channel.personalise(document, timeout=SETUP_TIMEOUT), self._plug_memory(self._monitor)
        )
        self._check_setup(identity)
        self.done("personalise")
        self.timings["mounts"] = identity.timings.get("mounts", 0.0)
        await self._trust(fresh=True)
        if self.plan.runtime != "none":
            runtime, context = self._runtime()
            await runtime.after_fork(self.channel, context)
            self.done("runtime")

    @staticmethod
    def _check_setup(state: SeedState) -> None:
        if state.state == "applied":
            return
        # A folder that cannot be mounted where it was wished is not the warm image's fault.
        wished = all(line.startswith("mount ") for line in state.errors)
        kind = _SetupError if wished else GuestError
        raise kind("the guest could not be set up", details="\n".join(state.errors))

    async def _plug_memory(self, monitor: Monitor) -> None:
        if self.plan.plug:
            from qvm.supervisor.forking import plug_memory

            await plug_memory(monitor, "dimm0", self.plan.plug)

    async def _boot(self) -> None:
        await self.channel.connect(self._folder.agent_socket)
        await self.channel.hello(timeout=FOREIGN_BOOT_TIMEOUT if self.plan.firmware_vars else BOOT_TIMEOUT)
        self.done("boot")
        seed = await self.channel.wait_for_seed()
        self._check_setup(seed)
        self.done("personalise")
        self.timings["mounts"] = seed.timings.get("mounts", 0.0)
        await self._trust(fresh=False)
        if self.plan.runtime != "none":
            from qvm.supervisor.ready import start_runtime

            runtime, context = self._runtime()
            await start_runtime(runtime, self.channel, context)
            self.done("runtime")

    async def _trust(self, *, fresh: bool) -> None:
        if self.plan.ca_certs:
            from qvm.runtime.network import Network
            from qvm.runtime.trust import install_certificates
            from qvm.supervisor.hostnetwork import read_authorities

            network = Network(authorities=read_authorities(self.plan.ca_certs))
            await install_certificates(self.channel, network, fresh=fresh)
            self.done("certificates")

    async def _settle(self, monitor: Monitor) -> None:
        """What only some machines need before a command runs: more memory, a larger data disk."""
        if self.plan.plug:
            await self.channel.settle_hardware(self.plan.cpus, self.plan.memory)
        if self.plan.grow:
            await monitor.execute("block_resize", {"node-name": "disk-data", "size": self.plan.data_size})
            await self.channel.grow()
        if self.plan.plug or self.plan.grow:
            self.done("hardware")

    def _runtime(self) -> tuple[Runtime, RuntimeContext]:
        from qvm.runtime.base import RuntimeContext
        from qvm.runtime.registry import load_runtime

        folder = self._folder.path
        return load_runtime(self.plan.runtime), RuntimeContext("run", folder, folder, str(self.plan.user["name"]))

    def start(self, argv: Sequence[str], *, stdin: bool, tty: TtySize | None = None, input: bytes | None = None,
              cwd: str | None = None) -> GuestProcess:
        """Begin a command as the guest's user, in the plan's folder unless `cwd` says otherwise."""
        return self.channel.start_process(
            argv, stdin=stdin, tty=tty, input=input, cwd=cwd or self.plan.cwd, user=str(self.plan.user["name"])
        )

    def explain(self, error: GuestError) -> QvmError:
        """What a broken channel means: QEMU's own words where it has ended."""
        return self._ended_early() if self._qemu.has_ended(_END_PATIENCE) else error

    def _ended_early(self) -> QemuError:
        size = os.fstat(self._log).st_size
        words = os.pread(self._log, 4096, max(0, size - 4096)).decode(errors="replace").strip()
        code = self._qemu.child.poll()
        how = "at once" if code is None else f"with signal {-code}" if code < 0 else f"with exit code {code}"
        return QemuError(f"QEMU ended {how}", details="\n".join(words.splitlines()[-15:]) or None)


@contextmanager
def launch(plan: RunPlan, env: Mapping[str, str]) -> Iterator[Machine]:
    """Start the machine of `plan`; when the block ends, nothing of it is left.

    Raises WarmGoneError where the warm image has gone, HostError where the host refuses.
    """
    began = time.monotonic()
    keeper = Keeper(plan, env)
    try:
        yield Machine(plan, keeper.begin(), began)
    finally:
        keeper.end()


def discard_warm(folder: Path) -> None:
    """A warm image that did not come to life is not tried again."""
    from qvm.warm import store

    warm = store.load_warm(folder)
    if warm is not None:
        store.discard_warm(warm)

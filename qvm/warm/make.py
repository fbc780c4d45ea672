"""Make a warm image: boot a machine that belongs to nobody until its runtime answers, and freeze it."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from qvm import paths
from qvm.errors import GuestError, NotReadyError, QemuError, QvmError
from qvm.guest.bootwatch import PANIC_REQUIREMENT, PanicWatch
from qvm.guest.channel import AgentChannel
from qvm.guest.keys import ensure_key
from qvm.guest.streams import StreamMux
from qvm.image.disk import create_data_disk, create_disk, create_overlay, disk_info
from qvm.instance.record import write_json
from qvm.instance.runfolder import make_run_folder, sweep_runs
from qvm.instance.spec import InstanceSpec
from qvm.locks import lock
from qvm.logtail import tail_of
from qvm.process import Identity, spawn_detached
from qvm.progress import Progress
from qvm.qemu.hostinfo import read_boot_id
from qvm.qemu.machine import start_qemu, stop_qemu, wait_gone
from qvm.qemu.monitor import Monitor
from qvm.qemu.state import save_devices
from qvm.runtime.base import RuntimeContext
from qvm.runtime.checking import wait_for_checks
from qvm.seed.data import SeedData
from qvm.seed.iso import write_iso
from qvm.seed.render import render_seed
from qvm.units import GiB
from qvm.warm.request import DATA_SIZE, RUNTIME, WarmRequest, build_warm_spec, nobodys_context, warm_key
from qvm.warm.store import MANIFEST, WarmImage, find_fresh, load_warm, lock_path, prune_warm, spend, sweep, warm_dir

BOOT_TIMEOUT = 300.0
"""Seconds until the agent answers; generous, for software emulation on a busy host."""
FOREIGN_BOOT_TIMEOUT = 1200.0
"""The same for an image that qvm did not make: firmware, boot loader, its own kernel and services, cloud-init."""
FOREIGN_ROOT_SIZE = 20 * GiB
QUIT_TIMEOUT = 30.0
QEMU_REQUIREMENT = "qemu"
"""Of the NotReadyError of a machine whose QEMU ended: QEMU 7.2's TCG dies now and then, with or without words
(`iotlb_to_section`), where a boot moves devices while another processor of the guest uses one."""
_ENDING = 1.0
"""Seconds from the end of QEMU's sockets to the end of its process, at most; it may write a core in them."""
# Under systemd cloud-init's stages are services like others.
_UNTIL_QUIET = """
if [ -d /run/systemd/system ]; then exec systemctl is-system-running --wait; fi
command -v cloud-init >/dev/null && exec cloud-init status --wait
"""

Tell = Callable[[str, str, float], None]


def ensure_warm(request: WarmRequest, *, count: int = 1, progress: Progress) -> WarmImage:
    """The warm image of `request`, made first where there is none (once: others wait for the maker, then use it).

    Of those for single use there are `count` in stock then.

    Raises QvmError where the machine does not come up; nothing is left then. A maker that is killed takes its machine
    with it. Must be called from the main thread.
    """
    request.features.require_restore()
    key = warm_key(request)
    wanted = count if request.single_use else 1
    if len(fresh := find_fresh(key)) >= wanted:
        return fresh[0]
    with lock(lock_path(key), what=f"the warm image {request.title}", on_wait=progress.note):
        while len(fresh := find_fresh(key)) < wanted:
            try:
                _make(request, key, progress)
            except NotReadyError as error:
                if error.requirement not in (PANIC_REQUIREMENT, QEMU_REQUIREMENT) or request.accel != "tcg":
                    raise
                progress.note(f"{error.message}; it is booted once more")
                _make(request, key, progress)
    for old in prune_warm(keep=key):
        progress.note(f"removed the warm image {old.title}, the one used longest ago")
    return fresh[0]


def _make(request: WarmRequest, key: str, progress: Progress) -> None:
    """Make one; the key's lock is held."""
    progress.note(f"no warm image of {request.title} yet: booting it once and freezing it")
    sweep(key)
    name = f"{key}-{secrets.token_hex(4)}"
    folder = paths.ensure_private_dir(warm_dir() / f".{name}")
    # A cache's path may be longer than a socket's may.
    sweep_runs()
    run = make_run_folder()
    try:
        maker = _Maker(request, folder, run.path, progress.milestone)
        request.runtime.prepare_host(maker.context(), progress)
        asyncio.run(maker.make())
        final = warm_dir() / name
        folder.rename(final)
    finally:
        run.close()
        shutil.rmtree(folder, ignore_errors=True)
    if load_warm(final) is None:
        raise QvmError("the warm image vanished as soon as it was made", hint="this is a defect in qvm")
    spawn_detached([sys.executable, "-m", "qvm.warm.settle", str(final)], log=final / "settle.log")


def take_warm(request: WarmRequest, *, progress: Progress) -> WarmImage:
    """The warm image for one fork, made first where there is none; of those for single use, one that is nobody else's.

    Raises as `ensure_warm` does.
    """
    while True:
        warm = ensure_warm(request, progress=progress)
        if not request.single_use or spend(warm):
            return warm


class _Maker:
    def __init__(self, request: WarmRequest, folder: Path, sockets: Path, tell: Tell) -> None:
        self.request = request
        self.folder = folder
        self.sockets = sockets
        self.tell = tell
        self.timings: dict[str, float] = {}
        self._last = time.monotonic()

    async def make(self) -> None:
        request, folder = self.request, self.folder
        spec = build_warm_spec(request, folder, sockets=self.sockets)
        self._write_files(spec)
        identity = start_qemu(spec, request.features, log=folder / "qemu.log", tied=True)
        monitor = await Monitor.connect(spec.monitor_socket)
        self._done("warm qemu")
        try:
            version = await self._boot(spec, monitor)
            await monitor.pause()
            await save_devices(monitor, folder / "devices")
            await monitor.quit()
            if not await wait_gone(identity, QUIT_TIMEOUT):
                raise QemuError(f"QEMU did not end within {QUIT_TIMEOUT:g} s after the freeze")
            self._done("warm freeze")
        except QvmError as error:
            if not await wait_gone(identity, _ENDING):
                await self._abandon(identity, monitor)
                raise
            await monitor.close()
            raise self._ended() from error
        except BaseException:
            await self._abandon(identity, monitor)
            raise
        await monitor.close()
        self._seal(version)

    def context(self) -> RuntimeContext:
        return nobodys_context(self.request.settings, self.request.arch, self.folder)

    @property
    def boot_timeout(self) -> float:
        return FOREIGN_BOOT_TIMEOUT if self.request.image.is_foreign else BOOT_TIMEOUT

    def _ended(self) -> NotReadyError:
        details = tail_of(self.folder / "qemu.log")
        return NotReadyError(QEMU_REQUIREMENT, "QEMU ended while the warm image booted", details=details or None)

    async def _abandon(self, identity: Identity, monitor: Monitor) -> None:
        await stop_qemu(identity, monitor, force=True)
        await monitor.close()

    def _done(self, name: str) -> None:
        now = time.monotonic()
        self.timings[name] = now - self._last
        self.tell(name, "done", now - self._last)
        self._last = now

    def _write_files(self, spec: InstanceSpec) -> None:
        image, folder = self.request.image, self.folder
        (folder / "idle").mkdir(mode=0o500)
        size = disk_info(image.disk, format=image.format).virtual_size
        if image.is_foreign:
            size = max(size, FOREIGN_ROOT_SIZE)  # cloud-init's first boot grows the partition to it
        create_overlay(folder / "root.qcow2", backing=image.disk, backing_format=image.format, size=size)
        if self.request.stage == RUNTIME:
            create_data_disk(folder / "data.qcow2", DATA_SIZE)
        else:
            create_disk(folder / "data.qcow2", GiB)  # only fills its slot
        assert spec.ram_file is not None
        with spec.ram_file.open("wb") as ram:
            spec.ram_file.chmod(0o600)
            ram.truncate(spec.memory)
        write_iso(render_seed(self._seed()), folder / "seed.iso")

    def _seed(self) -> SeedData:
        """Of a machine that is nobody's: sshd has a key to start with, which no fork keeps."""
        mounted = self.request.stage == RUNTIME
        key = self.folder / "key"
        ensure_key(key, comment="warm")
        try:
            return SeedData(
                instance_id=self.folder.name, hostname="warm", user="root", uid=0, gid=0, home="/root",
                shell="/bin/bash", authorized_keys=(), host_key=key.read_text(),
                host_key_public=key.with_suffix(".pub").read_text().strip(), mounts=(), env={}, dns=(),
                data_folders=tuple(str(folder) for folder in self.request.runtime.data_folders) if mounted else (),
                data_disk=mounted, mac="",
            )
        finally:
            key.unlink()
            key.with_suffix(".pub").unlink()

    async def _boot(self, spec: InstanceSpec, monitor: Monitor) -> str:
        """From power on to quiet; returns the runtime's version."""
        channel = AgentChannel()
        try:
            await channel.connect(spec.agent_socket)
            await self._await_hello(channel, monitor, spec)
            self._done("warm agent")
            seed = await channel.wait_for_seed()
            if seed.state != "applied":
                raise GuestError("the guest could not be set up", details="\n".join(seed.errors))
            self._done("warm seed")
            if self.request.image.is_foreign:  # before packages are installed, its own services have to be up
                await channel.exec(["sh", "-c", _UNTIL_QUIET], check=False, timeout=self.boot_timeout)
            # Processors wait often while a runtime starts.
            ahead = asyncio.create_task(channel.freeze("ahead", timeout=self.boot_timeout))
            try:
                version = await self._start_runtime(channel, spec)
                self.timings |= {f"ahead {name}": seconds for name, seconds in (await ahead).items()}
            finally:
                ahead.cancel()
            # What the boot has left to do, each fork would have to do again.
            await channel.exec(["sh", "-c", _UNTIL_QUIET], check=False, timeout=self.boot_timeout)
            self._done("warm boot")
            steps = await channel.freeze(self.request.stage)
            self._done("warm quiet")
            self.timings |= {f"quiet {name}": seconds for name, seconds in steps.items()}
        finally:
            await channel.close()
        return version

    async def _await_hello(self, channel: AgentChannel, monitor: Monitor, spec: InstanceSpec) -> None:
        async def hello() -> None:
            try:
                await channel.hello(timeout=self.boot_timeout)
            except QvmError as error:
                raise NotReadyError("agent", error.message, details=tail_of(spec.serial_log) or None) from error

        tell = self._tell_phase if self.request.image.is_foreign else None
        with PanicWatch(spec.serial_log, tell, monitor.quit):
            await monitor.unless_closed(hello(), self._ended)

    def _tell_phase(self, name: str, state: str, seconds: float) -> None:
        self.tell(f"warm {name}", state, seconds)

    async def _start_runtime(self, channel: AgentChannel, spec: InstanceSpec) -> str:
        if self.request.stage != RUNTIME:
            return ""
        runtime = self.request.runtime
        context = self.context()
        streams = StreamMux(channel)  # a runtime may have large files to send
        try:
            await streams.connect(spec.stream_socket)
            channel.streams = streams
            await runtime.provision(channel, context)
            await runtime.start(channel, context)
        finally:
            channel.streams = None
            await streams.close()
        await wait_for_checks(runtime, channel, context)
        version = await runtime.version(channel, context)
        await runtime.before_freeze(channel, context)
        if runtime.name != "none":
            self._done(f"warm {runtime.name}")
        return version

    def _seal(self, version: str) -> None:
        """What is left behind is what forks need; disks reach the disk now, the RAM in its own time (settle.py)."""
        request, folder = self.request, self.folder
        for name in ("serial.log", "qemu.log"):
            (folder / name).unlink(missing_ok=True)
        for path in (*folder.glob("*.qcow2"), *folder.glob("*.fd"), folder / "devices", folder / "seed.iso"):
            paths.sync(path)
        files = {entry.name: entry.stat().st_size for entry in folder.iterdir() if entry.is_file()}
        write_json(folder / MANIFEST, {
            "version": 1, "title": request.title, "stage": request.stage, "image": request.image.id,
            "arch": request.arch.name, "runtime": request.runtime.name if request.stage == RUNTIME else "",
            "runtime_version": version, "cpus": request.cpus, "memory": request.memory,
            "mount_slots": request.mount_slots, "accel": request.accel,
            "qemu": request.features.version_text, "files": files, "host_boot": read_boot_id(),
            "created": time.time(), "timings": self.timings,
        })  # fmt: skip


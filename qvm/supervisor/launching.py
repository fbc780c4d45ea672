"""QEMU for an instance: booted from its disks, forked from a warm image, or gone on with from a saved state."""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from qvm.arch import find_arch
from qvm.errors import HostError, InstanceStateError
from qvm.filenames import FIRMWARE_VARS, Files
from qvm.image.store import Image
from qvm.instance.mounted import plan_mounts
from qvm.instance.record import Record, Run
from qvm.instance.spec import InstanceSpec
from qvm.instance.states import DEVICES, SavedState, changes_file, consume_state, dimm_file
from qvm.instance.states import RAM as RAM_FILE
from qvm.instance.store import save_run
from qvm.log import get_logger
from qvm.process import Identity
from qvm.qemu.features import QemuFeatures
from qvm.qemu.machine import start_qemu, stop_qemu
from qvm.qemu.monitor import Monitor
from qvm.qemu.probe import probe_qemu
from qvm.qemu.ramchanges import load_changes
from qvm.qemu.shape import host_address, read_shape
from qvm.qemu.state import restore_devices
from qvm.supervisor.assemble import build_spec
from qvm.supervisor.fitting import state_spec
from qvm.warm.fork import ForkPlan, build_fork_spec, restore_fork
from qvm.warm.store import WarmImage, using

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Launched:
    run: Run
    monitor: Monitor
    seconds: float


async def connect_monitor(files: Files, uuid: str) -> Monitor:
    """The conversation with the machine of that UUID; InstanceStateError where another one answers."""
    monitor = await Monitor.connect(files.monitor_socket)
    found = await monitor.uuid()
    if found != uuid:
        await monitor.close()
        raise InstanceStateError(f"the process on {files.monitor_socket} is another machine ({found})")
    return monitor


async def boot(record: Record, image: Image) -> Launched:
    """Start the machine from power off."""
    features, spec = await _plan_machine(record, image)
    return await _start(record, spec, features)


async def fork(record: Record, image: Image, plan: ForkPlan) -> tuple[Launched, WarmImage]:
    """Start the machine where the warm image stopped; it is paused, for the caller to let go (`Monitor.resume`).

    Raises QvmError where the warm image has gone or does not fit; what was started is ended then.
    """
    warm = plan.load()
    if warm is None:
        raise HostError("the warm image has gone or is damaged")
    files = Files(record.config.profile)
    with using(warm):
        features, own = await _plan_machine(record, image)
        launched = await _start(record, build_fork_spec(warm, own), features)
        _note_restore(files, f"a fork of the warm image {warm.key} ({warm.title})")
        try:
            await restore_fork(launched.monitor, warm, features)
        except BaseException:
            await launched.monitor.close()
            raise
    # From here on the disks are the machine's own: no second fork of them.
    files.fork_plan.unlink()
    return launched, warm


async def revive(record: Record, image: Image, state: SavedState) -> Launched:
    """Start the machine where its suspended state left it; it is paused, and the state is used up.

    Raises QvmError where the state does not fit any more; what was started is left to the caller to end.
    """
    files = Files(record.config.profile)
    features, own = await _plan_machine(record, image)
    variables = files.suspended / FIRMWARE_VARS
    if variables.exists():
        await asyncio.to_thread(shutil.copyfile, variables, files.firmware_vars)
    launched = await _start(record, state_spec(own, state, files.suspended, features), features)
    _note_restore(files, "its own")
    try:
        await _put_changes(launched, record.config.arch, files.suspended)
        await restore_devices(launched.monitor, files.suspended / DEVICES, features)
        await asyncio.to_thread(consume_state, files.suspended)
    except BaseException:
        await launched.monitor.close()
        raise
    return launched


async def _put_changes(launched: Launched, arch: str, folder: Path) -> None:
    """Have RAM that began as a linked file be as it was saved; before the devices, which may look into it."""
    if not any(folder.glob("*.changes")):
        return
    for block in (await read_shape(launched.monitor, arch)).blocks:
        path = changes_file(folder / (dimm_file(block.id) if block.id else RAM_FILE))
        if path.exists():
            start = await host_address(launched.monitor, block)
            await asyncio.to_thread(load_changes, launched.run.qemu.pid, start, block.size, path)


async def _plan_machine(record: Record, image: Image) -> tuple[QemuFeatures, InstanceSpec]:
    arch = find_arch(record.config.arch)
    assert arch is not None, "validated when the record was made"
    return await asyncio.to_thread(probe_qemu, arch), build_spec(record, image, arch)


async def _start(record: Record, spec: InstanceSpec, features: QemuFeatures) -> Launched:
    files = Files(record.config.profile)
    began = time.monotonic()
    starting = asyncio.ensure_future(asyncio.to_thread(start_qemu, spec, features, log=files.qemu_log))
    try:
        identity = await asyncio.shield(starting)
    except asyncio.CancelledError:
        # The thread goes on whatever becomes of us, and nobody knows yet of the QEMU that it starts.
        (outcome,) = await asyncio.gather(starting, return_exceptions=True)
        if isinstance(outcome, Identity):
            await stop_qemu(outcome, None, force=True)
        raise
    run = Run(identity, record.ssh_port, record.accel, time.time(),
              mounts=plan_mounts(record.config.mounts, len(spec.mounts)))
    save_run(record.config.profile, run)
    return Launched(run, await connect_monitor(files, record.uuid), time.monotonic() - began)


def _note_restore(files: Files, what: str) -> None:
    """Say in the console's log why it has no boot in it."""
    with files.serial_log.open("a") as log_file:
        log_file.write(f"qvm: {time.strftime('%Y-%m-%dT%H:%M:%S')} this machine goes on from a saved state: {what}\n")

"""QEMU of one `qvm run` with its files: a thread of their own makes them, waits, and takes them away again.

The thread is what makes it sure. An interrupt is raised in the main thread, between any two of its steps; here it can
come between none. And the kernel ends QEMU with the thread that started it, which a caller's thread need not outlive.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qvm.errors import HostError
from qvm.filenames import FIRMWARE_VARS
from qvm.image.qcow2 import write_overlay
from qvm.instance.runfolder import RunFolder, make_run_folder, sweep_runs
from qvm.process import DyingProcess, spawn_dying
from qvm.supervisor.runplan import FOLDER, RunPlan, seed_data

if TYPE_CHECKING:
    from qvm.warm.store import WarmImage

# As for any machine of ours: sockets and files of QEMU are 0600.
_UMASK = 0o177


class WarmGoneError(HostError):
    """The warm image of the plan is no longer there."""

    code = "warm-gone"


@dataclass(frozen=True, slots=True)
class Started:
    """A QEMU that has just been started."""

    qemu: DyingProcess
    warm: WarmImage | None
    folder: RunFolder
    log: int
    """Its words, open for reading."""


class Keeper:
    """Use: `try: begin() ... finally: end()`, with nothing between the making and the `try`."""

    def __init__(self, plan: RunPlan, env: Mapping[str, str]) -> None:
        self._thread = threading.Thread(target=self._keep, name="qvm-run-keeper")
        self._plan = plan
        self._env = env
        self._over = threading.Event()
        self._begun = threading.Event()
        self._started: Started | None = None
        self._error: BaseException | None = None

    def begin(self) -> Started:
        """Start QEMU. Raises WarmGoneError, HostError."""
        self._thread.start()
        self._begun.wait()
        if self._error is not None:
            raise self._error
        assert self._started is not None
        return self._started

    def end(self) -> None:
        """Kill QEMU and remove its files; waits for that, but it happens even where the waiting is interrupted."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _keep(self) -> None:
        try:
            with ExitStack() as stack:
                self._started = _start(self._plan, self._env, stack)
                self._begun.set()
                sweep_runs()
                self._over.wait()
        except BaseException as error:  # handed over to `begin`
            self._error = error
        self._begun.set()


def _start(plan: RunPlan, env: Mapping[str, str], stack: ExitStack) -> Started:
    warm = _take_warm(plan, stack)
    folder = make_run_folder()
    stack.callback(folder.close)
    _write_disks(plan, folder.path)
    if warm is None:
        _write_seed(plan, env, folder.path / "seed.iso")
    log = os.open(folder.path / "qemu.log", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, log)
    # A comma in an option's value is written twice (qemu(1)).
    place = str(folder.path).replace(",", ",,")
    qemu = spawn_dying([word.replace(FOLDER, place) for word in plan.argv], log=log, umask=_UMASK)
    stack.callback(qemu.kill)
    return Started(qemu, warm, folder, log)


def _take_warm(plan: RunPlan, stack: ExitStack) -> WarmImage | None:
    """The plan's warm image, kept from being pruned until the stack unwinds."""
    if plan.warm is None:
        return None
    from qvm.warm.store import load_warm, using

    warm = load_warm(Path(plan.warm))
    if warm is None:
        raise WarmGoneError("the warm image has gone or is damaged")
    try:
        stack.enter_context(using(warm))
    except HostError as error:
        raise WarmGoneError(error.message) from error
    return warm


def _write_disks(plan: RunPlan, folder: Path) -> None:
    write_overlay(folder / "root.qcow2", backing=Path(plan.root), backing_format=plan.root_format, size=plan.root_size)
    if plan.firmware_vars is not None:
        shutil.copyfile(plan.firmware_vars, folder / FIRMWARE_VARS)
        (folder / FIRMWARE_VARS).chmod(0o600)
    if plan.data is not None:
        write_overlay(folder / "data.qcow2", backing=Path(plan.data), backing_format="qcow2", size=plan.data_size)
        return
    from qvm.image.disk import create_data_disk

    create_data_disk(folder / "data.qcow2", plan.data_size)


def _write_seed(plan: RunPlan, env: Mapping[str, str], path: Path) -> None:
    from qvm.seed.iso import write_iso
    from qvm.seed.render import render_seed

    write_iso(render_seed(seed_data(plan, env)), path)

"""An instance's disks: made for a cold start or a fork, grown when the profile says so."""

from __future__ import annotations

import shutil
from pathlib import Path

from qvm.filenames import Files
from qvm.image.disk import create_data_disk, create_overlay, disk_info, resize_disk
from qvm.image.store import Image
from qvm.instance.record import Record
from qvm.instance.states import find_state
from qvm.warm.fork import create_fork_disks, find_plan, save_plan
from qvm.warm.request import RUNTIME
from qvm.warm.store import WarmImage, pin


def ensure_disks(record: Record, image: Image) -> None:
    """Make the overlay and the data disk, or grow them; shrinking was refused when the settings were resolved.

    What a saved state goes on with stays as it is.
    """
    files = Files(record.config.profile)
    if find_state(files.suspended) is not None:
        return
    if not files.root_disk.exists():
        create_overlay(files.root_disk, backing=image.disk, backing_format=image.format, size=record.config.root_disk)
    _grow(files.root_disk, record.config.root_disk)
    if not files.data_disk.exists():
        create_data_disk(files.data_disk, record.config.disk)
    _grow(files.data_disk, record.config.disk)


def prepare_fork(record: Record, warm: WarmImage) -> None:
    """Make the disks of a new instance on `warm`, whose own they never are: the plan says they have not run yet.

    The running fork grows them (`qvm.supervisor.forking`); the caller holds `using(warm)`.
    """
    files = Files(record.config.profile)
    pin(warm, files.root_disk)
    create_fork_disks(warm, files.root_disk, files.data_disk)
    if warm.firmware_vars.exists():
        shutil.copyfile(warm.firmware_vars, files.firmware_vars)
        files.firmware_vars.chmod(0o600)
    if warm.stage != RUNTIME:
        _grow(files.data_disk, record.config.disk)
    save_plan(files.fork_plan, warm)


def undo_fork(record: Record, image: Image, *, stage: str) -> None:
    """Put disks for a cold start in the place of those a failed fork may have touched; a data disk that was there
    before it is kept."""
    _remove_fork_disks(Files(record.config.profile), stage)
    ensure_disks(record, image)


def drop_unused_fork(profile: str) -> None:
    """Forget the disks of a fork that never ran (its start was interrupted): they are made anew from what fits now."""
    files = Files(profile)
    plan = find_plan(files.fork_plan)
    if plan is not None:
        _remove_fork_disks(files, plan.stage)


def _remove_fork_disks(files: Files, stage: str) -> None:
    """Remove what `prepare_fork` made; the plan last, so that an interrupted removal is taken up again."""
    files.root_disk.unlink(missing_ok=True)
    files.firmware_vars.unlink(missing_ok=True)
    if stage == RUNTIME:
        files.data_disk.unlink(missing_ok=True)
    files.fork_plan.unlink(missing_ok=True)


def _grow(path: Path, size: int) -> None:
    if disk_info(path).virtual_size < size:
        resize_disk(path, size)

"""Begin a machine on a warm image: its disks, its command line, and the moment it starts to run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from qvm.image.disk import create_overlay, disk_info
from qvm.instance.record import read_json, write_json
from qvm.instance.spec import InstanceSpec
from qvm.qemu.features import QemuFeatures
from qvm.qemu.monitor import Monitor
from qvm.qemu.state import restore_devices
from qvm.warm.request import RUNTIME
from qvm.warm.store import WarmImage, load_warm, warm_dir

RESTORE_TIMEOUT = 20.0


@dataclass(frozen=True, slots=True)
class ForkPlan:
    """An instance whose disks are as the warm image's RAM knows them. Written by the start that made them, gone before
    the machine runs: disk and RAM are of one instant exactly once."""

    warm: Path
    stage: str

    def load(self) -> WarmImage | None:
        return load_warm(self.warm)


def save_plan(path: Path, warm: WarmImage) -> None:
    write_json(path, {"version": 1, "warm": warm.folder.name, "stage": warm.stage})


def find_plan(path: Path) -> ForkPlan | None:
    data = read_json(path)
    return None if data is None else ForkPlan(warm_dir() / str(data["warm"]), str(data["stage"]))


def create_fork_disks(warm: WarmImage, root: Path, data: Path | None) -> None:
    """The disks of the warm image's instant: an overlay at `root`, and for the runtime stage a copy at `data`.

    The copy stands alone, since a data disk outlives its instance and the warm image; it is a few MiB.
    """
    size = disk_info(warm.root_disk).virtual_size
    create_overlay(root, backing=warm.root_disk, backing_format="qcow2", size=size)
    if warm.stage == RUNTIME and data is not None:
        partial = data.with_name(data.name + ".partial")
        try:
            shutil.copyfile(warm.data_disk, partial)
            partial.chmod(0o600)
            partial.rename(data)
        finally:
            partial.unlink(missing_ok=True)


def build_fork_spec(warm: WarmImage, own: InstanceSpec) -> InstanceSpec:
    """The machine of `own` (as for a cold start) in the shape of the warm image and on its RAM."""
    return replace(
        own, cpus=int(warm.manifest["cpus"]), memory=int(warm.manifest["memory"]), ram_file=warm.ram, ram_shared=False,
        incoming=True, mount_slots=int(warm.manifest["mount_slots"]), idle_folder=warm.folder / "idle", dimms=(),
    )


async def restore_fork(monitor: Monitor, warm: WarmImage, features: QemuFeatures) -> None:
    """Give a machine begun with `build_fork_spec` the warm image's device state; it does not run yet."""
    await restore_devices(monitor, warm.devices, features, timeout=RESTORE_TIMEOUT)

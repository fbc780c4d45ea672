"""Which machine a saved state fits: the spec to go on from it, and the digest that says whether it still can."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from qvm import paths
from qvm.errors import InstanceStateError
from qvm.filenames import Files
from qvm.instance.spec import Dimm, Disk, InstanceSpec
from qvm.instance.states import RAM, SavedState, Shape, dimm_file
from qvm.qemu.cmdline import build_argv
from qvm.qemu.features import QemuFeatures
from qvm.qemu.hostinfo import read_cpu_model


def shape_spec(own: InstanceSpec, shape: Shape, *, folder: Path | None = None) -> InstanceSpec:
    """The machine of `own` (as for a cold start) in a shape that it had; `folder`: with the RAM that lies there."""
    return replace(
        own, cpus=shape.cpus, memory=shape.memory, mount_slots=shape.mounts,
        idle_folder=Files(own.name).folder / "idle", ram_file=folder / RAM if folder else None, ram_shared=False,
        dimms=tuple(Dimm(name, size, folder / dimm_file(name) if folder else None) for name, size in shape.dimms),
    )


def state_spec(own: InstanceSpec, state: SavedState, folder: Path, features: QemuFeatures) -> InstanceSpec:
    """The machine that goes on from `state`; InstanceStateError, with the reason, where none of now can."""
    assert state.shape is not None, "asked before"
    own = replace(own, mounts=own.mounts[:state.shape.mounts])  # the others are plugged in once it runs
    spec = shape_spec(own, state.shape, folder=None if state.streamed else folder)
    if own.accel != state.accel:
        raise InstanceStateError(f"it was saved under {state.accel}, and the accelerator is {own.accel} now")
    if machine_digest(spec, features) != state.machine:
        raise InstanceStateError(f"it was saved by another QEMU or another version of qvm (QEMU {state.qemu}; now "
                                 f"{features.version_text})")
    assert spec.idle_folder is not None
    paths.ensure_private_dir(spec.idle_folder)
    return replace(spec, incoming=True)


def machine_digest(spec: InstanceSpec, features: QemuFeatures) -> str:
    """Of everything a state must fit: QEMU's build, the host's CPU where the guest sees it, and the command line but
    for what may differ from start to start (names of files, ports, what is mounted)."""
    somewhere = Path("/x")
    neutral = replace(
        spec, name="", uuid="", mac="", ssh_port=0, mounts=(), plug_link=None, idle_folder=somewhere, incoming=False,
        ram_file=None, mount_slots=max(spec.mount_slots, len(spec.mounts)),
        disks=tuple(Disk(somewhere, disk.id, disk.format, disk.readonly) for disk in spec.disks),
        dimms=tuple(Dimm(dimm.id, dimm.size) for dimm in spec.dimms), monitor_socket=somewhere, agent_socket=somewhere,
        stream_socket=somewhere, serial_log=somewhere, firmware_vars=somewhere if spec.firmware_vars else None,
    )
    parts = [build_argv(neutral, features), features.build, features.machine,
             "" if spec.accel == "tcg" else read_cpu_model()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

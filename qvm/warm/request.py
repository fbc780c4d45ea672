"""What a warm image is made for, the machine it is frozen in, and the key that both decide. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qvm.agentbundle import agent_source
from qvm.arch import Arch
from qvm.config.model import Config
from qvm.filenames import FIRMWARE_VARS
from qvm.image.store import Image
from qvm.instance.kernel import kernel_boot
from qvm.instance.spec import Disk, InstanceSpec
from qvm.paths import cache_home, share_dir
from qvm.qemu.board import PLUGGABLE_MEMORY
from qvm.qemu.cmdline import build_argv
from qvm.qemu.devices import MAX_MOUNTS
from qvm.qemu.features import QemuFeatures
from qvm.qemu.hostinfo import read_cpu_model
from qvm.runtime.base import Runtime, RuntimeContext
from qvm.runtime.hostnames import names_digest
from qvm.runtime.stack import Stack, sections_of
from qvm.units import GiB, MiB

FORMAT = 1
"""Raised when forks of older warm images would not do."""
Stage = Literal["runtime", "base"]
RUNTIME: Stage = "runtime"
BASE: Stage = "base"
"""Stages: the runtime answering on a blank data disk that is mounted; or nothing started and no data disk."""
DATA_SIZE = 10 * GiB
"""Of the runtime stage's data disk. A fork grows its copy to what the profile says."""
COMMON_MEMORY = 2 * GiB
MEMORY_BLOCK = 128 * MiB
"""Linux plugs memory in blocks of this on x86-64."""
_SLOTS = (4, 16, MAX_MOUNTS)
_UUID = "00000000-0000-4000-8000-0000716d7761"
_MAC = "52:54:00:71:76:6d"


@dataclass(frozen=True)
class WarmRequest:
    image: Image
    arch: Arch
    features: QemuFeatures
    accel: str
    runtime: Stack
    stage: Stage
    cpus: int
    memory: int
    """Bytes the machine has from its boot on; more is plugged into a fork."""
    mount_slots: int
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Each runtime's section of the profile."""

    @property
    def single_use(self) -> bool:
        """Whether each fork needs a warm image of its own."""
        return self.stage == RUNTIME and self.runtime.single_use

    @property
    def title(self) -> str:
        """For people: `debian-13 with docker (x86_64, 2 CPUs, 2048 MiB)`."""
        what = f" with {self.runtime.name}" if self.stage == RUNTIME and self.runtime.name != "none" else ""
        return f"{self.image.name}{what} ({self.arch.name}, {self.cpus} CPUs, {self.memory // MiB} MiB)"


def choose_memory(wanted: int, arch: Arch) -> int:
    """The memory of the warm image that serves `wanted` bytes: the common size where the rest can be plugged in."""
    rest = wanted - COMMON_MEMORY
    if arch.memory_plug == "dimm" and 0 <= rest <= PLUGGABLE_MEMORY and rest % MEMORY_BLOCK == 0:
        return COMMON_MEMORY
    return wanted


def choose_mount_slots(mounts: int) -> int:
    return next((slots for slots in _SLOTS if mounts <= slots), _SLOTS[-1])


def build_request(
    config: Config, image: Image, arch: Arch, features: QemuFeatures, accel: str, runtime: Runtime, *, stage: Stage
) -> WarmRequest:
    """The warm image that a profile forks from. The base stage starts no runtime, so it is the same for all."""
    stack = runtime if isinstance(runtime, Stack) else Stack(runtime)
    sections = sections_of(config)
    return WarmRequest(
        image=image, arch=arch, features=features, accel=accel, stage=stage, cpus=config.cpus, runtime=stack,
        # What a runtime takes up in a fork stays out of what it is frozen with: others share that.
        settings={layer.name: layer.warm_settings(sections.get(layer.name, {})) for layer in stack.layers},
        memory=choose_memory(config.memory, arch), mount_slots=choose_mount_slots(len(config.mounts)),
    )


def nobodys_context(sections: Mapping[str, Mapping[str, Any]], arch: Arch, folder: Path) -> RuntimeContext:
    """For runtimes of a machine that is nobody's: the little they keep on the host goes into `folder`."""
    return RuntimeContext("warm", folder, folder, "root", cache_folder=cache_home() / "runtimes", arch=arch.name,
                          sections=sections)


def build_warm_spec(request: WarmRequest, folder: Path, *, sockets: Path | None = None) -> InstanceSpec:
    """The machine that is booted and frozen in `folder`; that of a fork is made from it (`build_fork_spec`).

    `sockets`: where its sockets are while it boots; `folder` unless given.
    """
    image, sockets = request.image, sockets or folder
    boot = kernel_boot(image.kernel, image.initrd, image.cmdline, request.arch, request.accel)
    return InstanceSpec(
        name="warm", uuid=_UUID, arch=request.arch.name, accel=request.accel, cpus=request.cpus, memory=request.memory,
        disks=(
            Disk(folder / "root.qcow2", "root"),
            Disk(folder / "data.qcow2", "data"),
            Disk(folder / "seed.iso", "seed", format="raw", readonly=True),
        ),
        mounts=(), mac=_MAC, ssh_port=0,
        monitor_socket=sockets / "m", agent_socket=sockets / "a", stream_socket=sockets / "s",
        serial_log=folder / "serial.log",
        boot=boot, firmware_vars=None if boot is not None else folder / FIRMWARE_VARS,
        ram_file=folder / "ram", ram_shared=True, mount_slots=request.mount_slots, idle_folder=folder / "idle",
    )


def warm_key(request: WarmRequest) -> str:
    """Names everything that makes a frozen state fit: one digest, so that any change leads to another warm image.

    The command line covers QEMU's build, machine, accelerator, CPUs, memory and devices.
    """
    parts = {
        "format": FORMAT,
        "image": request.image.id,
        "argv": build_argv(build_warm_spec(request, Path("/w")), request.features),
        "build": request.features.build,
        "machine": request.features.machine,
        "cpu": "" if request.accel == "tcg" else read_cpu_model(),
        "agent": hashlib.sha256(agent_source()).hexdigest(),
        "stage": request.stage,
        "foreign": _foreign_identity(request) if request.image.is_foreign else None,
        "runtime": request.runtime.warm_identity(request.settings) if request.stage == RUNTIME else None,
        "names": names_digest() if request.stage == RUNTIME else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _foreign_identity(request: WarmRequest) -> list[str]:
    """What else an image that qvm did not make boots by: the firmware, and what the seed tells cloud-init."""
    firmware = request.features.firmware
    files = [firmware.code, firmware.variables] if firmware is not None else []
    seed = share_dir("cloud-init")
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in (
        *files, seed / "user-data.yaml", seed / "network-config.yaml", seed / "install-agent.sh",
        seed / "qvm-agent.service",
    )]


def warm_obstacle(config: Config, image: Image, runtime: Runtime, *, stage: Stage) -> str | None:
    """Why no warm image can serve this; None where one can."""
    if stage == RUNTIME and config.disk < DATA_SIZE:
        return f"a data disk below {DATA_SIZE // GiB} GiB is made for the profile alone"
    return None

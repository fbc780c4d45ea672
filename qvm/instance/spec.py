"""InstanceSpec: one VM, completely decided; what the QEMU layer, the seed and the supervisor read.

Pure data: building a command line from it asks nothing of the host. Everything that could be chosen
(architecture, accelerator, ports, identifiers) has been chosen before one is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qvm.config.model import Mount


@dataclass(frozen=True, slots=True)
class Disk:
    """A virtio-blk disk. `format` is always explicit: QEMU must never guess it."""

    path: Path
    id: str
    """Also the disk's serial: the guest finds it as /dev/disk/by-id/virtio-<id>."""
    format: str = "qcow2"
    readonly: bool = False


@dataclass(frozen=True, slots=True)
class KernelBoot:
    """Direct kernel boot of an image that qvm built."""

    kernel: Path
    initrd: Path
    cmdline: str


@dataclass(frozen=True, slots=True)
class Dimm:
    """Memory plugged in on top of `InstanceSpec.memory`."""

    id: str
    size: int
    """Bytes."""
    file: Path | None = None
    """Content to begin with, mapped privately; None: zeros."""


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    name: str
    uuid: str
    arch: str
    accel: str
    """kvm, hvf or tcg: decided and proven."""
    cpus: int
    memory: int
    """Bytes."""
    disks: tuple[Disk, ...]
    """Root first, then data; the seed ISO last, read-only and raw."""
    mounts: tuple[Mount, ...]
    """Mount number i has the 9p tag `qvm<i>`."""
    mac: str
    ssh_port: int
    """The port of 127.0.0.1 that reaches the guest's sshd; 0: none does."""
    monitor_socket: Path
    agent_socket: Path
    stream_socket: Path
    serial_log: Path
    boot: KernelBoot | None
    """None: the firmware boots the root disk (UEFI)."""
    firmware_vars: Path | None = None
    ram_file: Path | None = None
    """A file that holds the RAM; None: anonymous memory."""
    ram_shared: bool = False
    """Whether what the guest writes reaches `ram_file` (a warm image in the making), or stays private to the machine,
    which then shares the rest with all others on the same file."""
    dimms: tuple[Dimm, ...] = ()
    incoming: bool = False
    """Start without running, and wait for the device state that `qvm.qemu.state.restore_devices` gives."""
    mount_slots: int = 0
    """9p devices at least: those beyond `mounts` export `idle_folder`, so that the guest sees the same devices
    whatever it mounts."""
    idle_folder: Path | None = None
    plug_link: Path | None = None
    """A link that leads to the folder which the next 9p device plugged in is to export; None: none can be."""

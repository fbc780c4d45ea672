"""The words of QEMU's command line, one small function per part of the machine. Pure.

Every function returns argv words: options and values alternate. Places are the same for all machine types (bus.py):

    slot 0x02 rng   0x03 (free)    0x04 serial channels   0x05 network   0x06-0x0b disks
    slot 0x0c       eight empty hot-plug ports (functions 0-7), with PCI Express: port0 ... port7
    slot 0x0d-0x1e  mounts, eight to a slot
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from qvm.arch import Arch, Bus
from qvm.config.model import Mount
from qvm.errors import QemuError, UsageError
from qvm.instance.spec import Disk, InstanceSpec
from qvm.qemu.board import kernel_words
from qvm.qemu.bus import place, virtio
from qvm.qemu.features import QemuFeatures
from qvm.qemu.words import Value, option

AGENT_PORT = "org.qvm.agent"
STREAM_PORT = "org.qvm.stream"
"""Names of the two virtio-serial ports: /dev/virtio-ports/<name> in the guest."""

SPARE_PORTS = 8

_SLOT_RNG, _SLOT_SERIAL, _SLOT_NETWORK, _SLOT_DISKS = 0x02, 0x04, 0x05, 0x06
_SLOT_PORTS, _SLOT_MOUNTS, _SLOT_END = 0x0C, 0x0D, 0x1F
_MAX_DISKS = _SLOT_PORTS - _SLOT_DISKS
MAX_MOUNTS = (_SLOT_END - _SLOT_MOUNTS) * 8
# A virtio-blk serial number has 20 bytes (virtio 1.2, 5.2.6.1).
_MAX_SERIAL = 20

def identity(spec: InstanceSpec, features: QemuFeatures) -> list[str]:
    """What the process is called; its name in `ps` can only be changed on Linux, to 15 bytes."""
    process = f"qvm-{spec.name}"[:15] if features.system == "Linux" else None
    return [
        *option("-name", "", {"guest": spec.name, "process": process}),
        "-uuid", spec.uuid,
    ]


def boot(spec: InstanceSpec, arch: Arch, features: QemuFeatures) -> list[str]:
    """Direct kernel boot, or the first disk by the machine's own firmware, or UEFI from two flash images."""
    if spec.boot is not None:
        return [
            "-kernel", str(spec.boot.kernel),
            "-initrd", str(spec.boot.initrd),
            "-append", " ".join((spec.boot.cmdline, *kernel_words(spec, features))),
        ]
    if not arch.has_uefi:
        return []
    firmware = features.firmware
    if firmware is None or spec.firmware_vars is None:
        raise QemuError("a machine without a kernel needs UEFI firmware and a file for its variables")
    return [
        *option("-drive", "if=pflash", {"unit": 0, "format": "raw", "readonly": True, "file": firmware.code}),
        *option("-drive", "if=pflash", {"unit": 1, "format": "raw", "file": spec.firmware_vars}),
    ]


def spare_ports(arch: Arch, features: QemuFeatures) -> list[str]:
    """Empty PCIe ports to plug devices into. They reserve no I/O space: virtio 1 devices use none.

    On the other buses devices are plugged in where there is room.
    """
    if arch.bus != "pcie":
        return []
    io = {"io-reserve": 0} if features.has("pcie-root-port", "io-reserve") else {}
    return [
        word for number in range(SPARE_PORTS)
        for word in option("-device", "pcie-root-port",
                           {"id": f"port{number}", **place(arch.bus, _SLOT_PORTS, number), "chassis": number + 1, **io})
    ]


def disks(spec: InstanceSpec, arch: Arch, features: QemuFeatures) -> list[str]:
    if len(spec.disks) > _MAX_DISKS:
        raise QemuError(f"at most {_MAX_DISKS} disks fit")
    return [
        word for number, entry in enumerate(spec.disks)
        for word in (*_backend(entry, features), *_drive(entry, number, arch.bus, boots=spec.boot is None))
    ]


def _backend(disk: Disk, features: QemuFeatures) -> list[str]:
    # Freed blocks travel down to the host's file, and zeroes are stored as holes: disks shrink as guests clean up.
    trim: dict[str, Value] = {} if disk.readonly else {"discard": "unmap", "detect-zeroes": "unmap"}
    return option("-blockdev", "", {
        "driver": disk.format,
        "node-name": f"disk-{disk.id}",
        "read-only": disk.readonly,
        **trim,
        "file.driver": "file",
        "file.filename": disk.path,
        "file.aio": "io_uring" if features.io_uring else "threads",
        **({} if disk.readonly else {"file.discard": "unmap"}),
    })


def _drive(disk: Disk, number: int, bus: Bus, *, boots: bool) -> list[str]:
    if len(disk.id.encode()) > _MAX_SERIAL:
        raise QemuError(f"the disk id {disk.id!r} is longer than {_MAX_SERIAL} bytes")
    return option("-device", virtio("blk", bus), {
        "id": f"drive-{disk.id}",
        **place(bus, _SLOT_DISKS + number),
        "drive": f"disk-{disk.id}",
        "serial": disk.id,
        "bootindex": 0 if boots and number == 0 else None,
    })


def network(spec: InstanceSpec, arch: Arch) -> list[str]:
    """User-mode network; the host's loopback port `ssh_port` reaches the guest's sshd.

    No option ROM: it is for network boot, costs a second of every boot, and is not always installed.
    """
    forward = f"tcp:127.0.0.1:{spec.ssh_port}-:22" if spec.ssh_port else None
    return [
        *option("-netdev", "user", {"id": "net0", "hostfwd": forward}),
        # A restored guest would announce the MAC that a fork is about to change, and five times wake up for it.
        *option("-device", virtio("net", arch.bus), {
            "id": "nic0", **place(arch.bus, _SLOT_NETWORK), "netdev": "net0", "mac": spec.mac,
            "romfile": None if arch.bus == "ccw" else "", "guest_announce": False,
        }),
    ]


def channels(spec: InstanceSpec, arch: Arch) -> list[str]:
    """The agent's two byte streams, and the serial console that ends in a file."""
    return [
        *_listen("agent", spec.agent_socket),
        *_listen("stream", spec.stream_socket),
        *option("-device", virtio("serial", arch.bus), {"id": "channels", **place(arch.bus, _SLOT_SERIAL)}),
        *option("-device", "virtserialport",
                {"bus": "channels.0", "nr": 1, "id": "port-agent", "chardev": "agent", "name": AGENT_PORT}),
        *option("-device", "virtserialport",
                {"bus": "channels.0", "nr": 2, "id": "port-stream", "chardev": "stream", "name": STREAM_PORT}),
        *option("-chardev", "file", {"id": "console", "path": spec.serial_log, "append": True}),
        "-serial", "chardev:console",
    ]


def monitor(spec: InstanceSpec) -> list[str]:
    return [*_listen("monitor", spec.monitor_socket), *option("-mon", "", {"chardev": "monitor", "mode": "control"})]


def _listen(name: str, path: Path) -> list[str]:
    return option("-chardev", "socket", {"id": name, "path": path, "server": True, "wait": False})


def comforts(arch: Arch, features: QemuFeatures) -> list[str]:
    """Entropy for the guest.

    No balloon: what it returns of a privately mapped RAM file, QEMU punches out of the file, which other machines use.
    """
    device = virtio("rng", arch.bus)
    if not features.has(device):
        return []
    return [
        *option("-object", "rng-builtin", {"id": "entropy"}),
        *option("-device", device, {"id": "rng0", **place(arch.bus, _SLOT_RNG), "rng": "entropy"}),
    ]


def incoming(spec: InstanceSpec) -> list[str]:
    """Every machine writes and reads states without the header of a migration (see state.py), so that any can go on
    from another's. One that is to do so waits for it, and runs when told to.

    Such a state leaves the firmware out, which only a machine that resets would miss: a reset ends QEMU, and whoever
    started it starts the machine anew, cold.
    """
    wait = ["-S", "-no-reboot", "-incoming", "defer"] if spec.incoming else []
    return [*wait, "-global", "migration.send-configuration=off"]


def mounts(spec: InstanceSpec, arch: Arch, features: QemuFeatures) -> list[str]:
    """Host folders over 9p. `security_model=none`: files get the owner and mode that the host user can give them."""
    if (spec.mounts or spec.mount_slots) and not features.has(virtio("9p", arch.bus)):
        raise QemuError(f"{features.binary} was built without 9p, and this instance mounts host folders",
                        hint="use the QEMU of a distribution that has it, or start with --mount none")
    if len(spec.mounts) > MAX_MOUNTS:
        raise UsageError(f"at most {MAX_MOUNTS} mounts fit", hint="mount a folder above them instead")
    entries = list(spec.mounts)
    if spec.idle_folder is not None:
        idle = Mount(spec.idle_folder, PurePosixPath("/"), writable=False)
        entries += [idle] * (spec.mount_slots - len(entries))
    words = [word for number, entry in enumerate(entries) for word in _mount(entry, number, arch.bus)]
    return [*words, *(_plug_sources(spec.plug_link) if features.has(virtio("9p", arch.bus)) else [])]


def _plug_sources(link: Path | None) -> list[str]:
    """What devices that are plugged in later export (plug.py)."""
    if link is None:
        return []
    return [
        word for writable in (True, False)
        for word in _source(plug_source(writable=writable), link, writable=writable)
    ]


def plug_source(*, writable: bool) -> str:
    return "plug-rw" if writable else "plug-ro"


def _source(name: str, path: Path, *, writable: bool) -> list[str]:
    return option("-fsdev", "local", {
        "id": name,
        "path": path,
        "security_model": "none",
        "multidevs": "remap",
        "readonly": None if writable else True,
    })


def _mount(mount: Mount, number: int, bus: Bus) -> list[str]:
    return [
        *_source(f"fs{number}", mount.source, writable=mount.writable),
        *option("-device", virtio("9p", bus), {
            "id": f"mount{number}", **place(bus, _SLOT_MOUNTS + number // 8, number % 8),
            "fsdev": f"fs{number}", "mount_tag": f"qvm{number}",
        }),
    ]


def sandbox(features: QemuFeatures) -> list[str]:
    """System call filters (Linux): a guest that breaks into QEMU starts no program and gains no privilege."""
    if not features.sandbox:
        return []
    return option("-sandbox", "on", dict.fromkeys(("obsolete", "elevateprivileges", "spawn", "resourcecontrol"),
                                                  "deny"))

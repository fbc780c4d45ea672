"""The words of QEMU's command line, one small function per part of the machine. Pure.

Every function returns argv words: options and values alternate. PCI addresses are fixed here, once, for both
machine types (root bus pcie.0, slots 0x01 to 0x1e free on q35 and virt alike): a guest sees the same devices at the
same places whatever else it is given, and a warm image fits the command line it was frozen under.

    slot 0x02 rng   0x03 (free)    0x04 serial channels   0x05 network   0x06-0x0b disks
    slot 0x0c       eight empty hot-plug ports (functions 0-7): port0 ... port7
    slot 0x0d-0x1e  mounts, eight to a slot
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from qvm.arch import AARCH64, X86_64
from qvm.config.model import Mount
from qvm.errors import QemuError, UsageError
from qvm.instance.spec import Disk, InstanceSpec
from qvm.qemu.features import QemuFeatures
from qvm.units import GiB, MiB

AGENT_PORT = "org.qvm.agent"
STREAM_PORT = "org.qvm.stream"
"""Names of the two virtio-serial ports: /dev/virtio-ports/<name> in the guest."""

BUS = "pcie.0"
SPARE_PORTS = 8
MEMORY_SLOTS = 4
"""DIMMs that can be plugged into a running guest."""
PLUGGABLE_MEMORY = 64 * GiB
"""Bytes of them; an address range that costs nothing until something is plugged in."""
TCG_CACHE = 512
"""MiB of translated code. QEMU's default is a fraction of that for small guests, and a boot overflows it."""

_SLOT_RNG, _SLOT_SERIAL, _SLOT_NETWORK, _SLOT_DISKS = 0x02, 0x04, 0x05, 0x06
_SLOT_PORTS, _SLOT_MOUNTS, _SLOT_END = 0x0C, 0x0D, 0x1F
_MAX_DISKS = _SLOT_PORTS - _SLOT_DISKS
MAX_MOUNTS = (_SLOT_END - _SLOT_MOUNTS) * 8
# A virtio-blk serial number has 20 bytes (virtio 1.2, 5.2.6.1).
_MAX_SERIAL = 20

Value = str | int | bool | Path | None


def option(flag: str, head: str, values: Mapping[str, Value] | None = None) -> list[str]:
    """`[flag, "head,key=value,..."]`: booleans as on/off, None left out, commas in values doubled."""
    words = [head, *(f"{key}={_text(value)}" for key, value in (values or {}).items() if value is not None)]
    return [flag, ",".join(word for word in words if word)]


def _text(value: Value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(",", ",,")


def _at(slot: int, function: int | None = None) -> dict[str, Value]:
    """Bus and address; a `function` number puts up to eight devices on one slot."""
    if function is None:
        return {"bus": BUS, "addr": f"{slot:#04x}"}
    return {"bus": BUS, "addr": f"{slot:#04x}.{function:#x}", "multifunction": True if function == 0 else None}


def identity(spec: InstanceSpec, features: QemuFeatures) -> list[str]:
    """What the process is called; its name in `ps` can only be changed on Linux, to 15 bytes."""
    process = f"qvm-{spec.name}"[:15] if features.system == "Linux" else None
    return [
        *option("-name", "", {"guest": spec.name, "process": process}),
        "-uuid", spec.uuid,
    ]


def machine(spec: InstanceSpec, features: QemuFeatures) -> list[str]:
    """Board, accelerator, CPU, memory. Nothing on the board that no guest of ours uses: each costs boot time."""
    if spec.arch == X86_64.name:
        board: dict[str, Value] = {"smm": False, "vmport": False, "sata": False}
    else:
        board = {"gic-version": _interrupt_controller(spec, features)}
    return [
        *option("-machine", X86_64.machine if spec.arch == X86_64.name else AARCH64.machine,
                # What describes the state to people would follow it; the saver we use (state.py) leaves it out.
                {**board, "memory-backend": "ram", "suppress-vmdesc": True}),
        *accelerator(spec.arch, spec.accel, features),
        *option("-smp", "", {"cpus": spec.cpus, "sockets": 1, "cores": spec.cpus, "threads": 1}),
        *_memory(spec),
        *option("-rtc", "", {"base": "utc"}),
    ]


def accelerator(arch: str, accel: str, features: QemuFeatures) -> list[str]:
    """-accel and -cpu. The same words serve the machine and the accelerator's proof."""
    if accel != "tcg":
        return ["-accel", accel, "-cpu", "host"]
    # An x86 guest expects stronger memory ordering than an Arm host gives: there QEMU chooses the threading itself.
    weaker = arch == X86_64.name and features.host_machine not in ("x86_64", "AMD64")
    # Linux clears and copies pages with `rep stosb` where the CPU announces it as fast (ERMS, FSRM); TCG does that
    # byte by byte, and touching fresh memory takes twice as long. On Arm, QEMU's own pointer authentication algorithm
    # instead of the architected one boots 1.5 times faster.
    cpu = "max,-erms,-fsrm" if arch == X86_64.name else "max,pauth-impdef=on"
    return [
        *option("-accel", "tcg", {"thread": None if weaker else "multi", "tb-size": TCG_CACHE}),
        "-cpu", cpu,
    ]


def _interrupt_controller(spec: InstanceSpec, features: QemuFeatures) -> str:
    """KVM gives the host's own. HVF learnt version 3 with QEMU 8.0; version 2 ends at eight CPUs."""
    if spec.accel == "kvm":
        return "host"
    return "2" if spec.accel == "hvf" and features.version < (8, 0, 0) else "3"


def _memory(spec: InstanceSpec) -> list[str]:
    pluggable = can_plug_memory(spec)
    return [
        *_memory_backend("ram", spec.memory, spec.ram_file, shared=spec.ram_shared),
        *option("-m", "", {
            "size": f"{spec.memory // MiB}M",
            "slots": MEMORY_SLOTS if pluggable else None,
            "maxmem": f"{(spec.memory + PLUGGABLE_MEMORY) // MiB}M" if pluggable else None,
        }),
        *(word for dimm in spec.dimms for word in (
            *_memory_backend(f"mem-{dimm.id}", dimm.size, dimm.file, shared=False),
            *option("-device", "pc-dimm", {"id": dimm.id, "memdev": f"mem-{dimm.id}"}),
        )),
    ]


def _memory_backend(name: str, size: int, file: Path | None, *, shared: bool) -> list[str]:
    backend: dict[str, Value] = {"id": name, "size": f"{size // MiB}M"}
    if file is None:
        return option("-object", "memory-backend-ram", backend)
    return option("-object", "memory-backend-file", {**backend, "mem-path": file, "share": shared})


def can_plug_memory(spec: InstanceSpec) -> bool:
    """A running Arm guest hears of new memory through ACPI, which only the firmware brings; HVF's address space on
    the first Apple chips is too small to set any aside."""
    return spec.arch == X86_64.name or (spec.boot is None and spec.accel != "hvf")


def boot(spec: InstanceSpec, features: QemuFeatures) -> list[str]:
    """Direct kernel boot, or UEFI from two flash images."""
    if spec.boot is not None:
        return [
            "-kernel", str(spec.boot.kernel),
            "-initrd", str(spec.boot.initrd),
            "-append", " ".join((spec.boot.cmdline, *_kernel_words(spec, features))),
        ]
    firmware = features.firmware
    if firmware is None or spec.firmware_vars is None:
        raise QemuError("a machine without a kernel needs UEFI firmware and a file for its variables")
    return [
        *option("-drive", "if=pflash", {"unit": 0, "format": "raw", "readonly": True, "file": firmware.code}),
        *option("-drive", "if=pflash", {"unit": 1, "format": "raw", "file": spec.firmware_vars}),
    ]


def _kernel_words(spec: InstanceSpec, features: QemuFeatures) -> tuple[str, ...]:
    """What this QEMU wants of the guest's kernel.

    QEMU's stable releases from 7.2.9, 8.1.5 and 8.2.1 on keep translated code by virtual address ("accel/tcg: Revert
    mapping of PCREL translation block to multiple virtual addresses"); 9.0 has a better cure. There, every program that
    starts at addresses of its own has the loader, libc and itself translated anew: 1850 blocks for `true`. Without
    address randomisation in the guest's programs it starts in less than half the time, and docker takes a quarter less
    of the CPU. That takes a defence from programs in the guest, not from the host's: the VM is the boundary.
    """
    return ("norandmaps",) if spec.accel == "tcg" and features.version < (9, 0, 0) else ()


def spare_ports(features: QemuFeatures) -> list[str]:
    """Empty PCIe ports to plug devices into. They reserve no I/O space: virtio 1 devices use none."""
    io = {"io-reserve": 0} if features.has("pcie-root-port", "io-reserve") else {}
    return [
        word for number in range(SPARE_PORTS)
        for word in option("-device", "pcie-root-port",
                           {"id": f"port{number}", **_at(_SLOT_PORTS, number), "chassis": number + 1, **io})
    ]


def disks(spec: InstanceSpec, features: QemuFeatures) -> list[str]:
    if len(spec.disks) > _MAX_DISKS:
        raise QemuError(f"at most {_MAX_DISKS} disks fit")
    return [
        word for number, entry in enumerate(spec.disks)
        for word in (*_backend(entry, features), *_drive(entry, number, uefi=spec.boot is None))
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


def _drive(disk: Disk, number: int, *, uefi: bool) -> list[str]:
    if len(disk.id.encode()) > _MAX_SERIAL:
        raise QemuError(f"the disk id {disk.id!r} is longer than {_MAX_SERIAL} bytes")
    return option("-device", "virtio-blk-pci", {
        "id": f"drive-{disk.id}",
        **_at(_SLOT_DISKS + number),
        "drive": f"disk-{disk.id}",
        "serial": disk.id,
        "bootindex": 0 if uefi and number == 0 else None,
    })


def network(spec: InstanceSpec) -> list[str]:
    """User-mode network; the host's loopback port `ssh_port` reaches the guest's sshd.

    No option ROM: it is for network boot, costs a second of every boot, and is not always installed.
    """
    forward = f"tcp:127.0.0.1:{spec.ssh_port}-:22" if spec.ssh_port else None
    return [
        *option("-netdev", "user", {"id": "net0", "hostfwd": forward}),
        # A restored guest would announce the MAC that a fork is about to change, and five times wake up for it.
        *option("-device", "virtio-net-pci", {
            "id": "nic0", **_at(_SLOT_NETWORK), "netdev": "net0", "mac": spec.mac, "romfile": "",
            "guest_announce": False,
        }),
    ]


def channels(spec: InstanceSpec) -> list[str]:
    """The agent's two byte streams, and the serial console that ends in a file."""
    return [
        *_listen("agent", spec.agent_socket),
        *_listen("stream", spec.stream_socket),
        *option("-device", "virtio-serial-pci", {"id": "channels", **_at(_SLOT_SERIAL)}),
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


def comforts(features: QemuFeatures) -> list[str]:
    """Entropy for the guest.

    No balloon: what it returns of a privately mapped RAM file, QEMU punches out of the file, which other machines use.
    """
    if not features.has("virtio-rng-pci"):
        return []
    return [
        *option("-object", "rng-builtin", {"id": "entropy"}),
        *option("-device", "virtio-rng-pci", {"id": "rng0", **_at(_SLOT_RNG), "rng": "entropy"}),
    ]


def incoming(spec: InstanceSpec) -> list[str]:
    """Every machine writes and reads states without the header of a migration (see state.py), so that any can go on
    from another's. One that is to do so waits for it, and runs when told to.

    Such a state leaves the firmware out, which only a machine that resets would miss: a reset ends QEMU, and whoever
    started it starts the machine anew, cold.
    """
    wait = ["-S", "-no-reboot", "-incoming", "defer"] if spec.incoming else []
    return [*wait, "-global", "migration.send-configuration=off"]


def mounts(spec: InstanceSpec, features: QemuFeatures) -> list[str]:
    """Host folders over 9p. `security_model=none`: files get the owner and mode that the host user can give them."""
    if (spec.mounts or spec.mount_slots) and not features.has("virtio-9p-pci"):
        raise QemuError(f"{features.binary} was built without 9p, and this instance mounts host folders",
                        hint="use the QEMU of a distribution that has it, or start with --mount none")
    if len(spec.mounts) > MAX_MOUNTS:
        raise UsageError(f"at most {MAX_MOUNTS} mounts fit", hint="mount a folder above them instead")
    entries = list(spec.mounts)
    if spec.idle_folder is not None:
        idle = Mount(spec.idle_folder, PurePosixPath("/"), writable=False)
        entries += [idle] * (spec.mount_slots - len(entries))
    return [word for number, entry in enumerate(entries) for word in _mount(entry, number)]


def _mount(mount: Mount, number: int) -> list[str]:
    return [
        *option("-fsdev", "local", {
            "id": f"fs{number}",
            "path": mount.source,
            "security_model": "none",
            "multidevs": "remap",
            "readonly": None if mount.writable else True,
        }),
        *option("-device", "virtio-9p-pci", {
            "id": f"mount{number}", **_at(_SLOT_MOUNTS + number // 8, number % 8),
            "fsdev": f"fs{number}", "mount_tag": f"qvm{number}",
        }),
    ]


def sandbox(features: QemuFeatures) -> list[str]:
    """System call filters (Linux): a guest that breaks into QEMU starts no program and gains no privilege."""
    if not features.sandbox:
        return []
    return option("-sandbox", "on", dict.fromkeys(("obsolete", "elevateprivileges", "spawn", "resourcecontrol"),
                                                  "deny"))

"""The QEMU command line of a machine: a pure function of the instance's spec and the binary's features."""

from __future__ import annotations

from qvm.arch import find_arch
from qvm.errors import QemuError
from qvm.instance.spec import InstanceSpec
from qvm.qemu import board, devices
from qvm.qemu.features import QemuFeatures
from qvm.qemu.firmware import missing_firmware_error


def build_argv(spec: InstanceSpec, features: QemuFeatures) -> list[str]:
    """argv, the binary first; every option and every value is a word of its own.

    Raises HostError where the machine boots by UEFI and the host has no firmware, QemuError or UsageError where
    this QEMU cannot be such a machine.
    """
    arch = find_arch(spec.arch)
    if arch is None or spec.arch != features.arch:
        raise QemuError(f"{features.binary} emulates {features.arch}, not {spec.arch}")
    if spec.boot is None and arch.has_uefi and features.firmware is None:
        raise missing_firmware_error(arch)
    if "user" not in features.netdevs:
        raise QemuError(f"{features.binary} was built without user-mode networking (libslirp)",
                        hint="use the QEMU of a distribution that has it")
    return [
        str(features.binary),
        "-nodefaults", "-no-user-config",
        "-display", "none",
        *devices.identity(spec, features),
        *board.machine(spec, features),
        *devices.boot(spec, arch, features),
        *devices.spare_ports(arch, features),
        *devices.disks(spec, arch, features),
        *devices.network(spec, arch),
        *devices.channels(spec, arch),
        *devices.comforts(arch, features),
        *devices.mounts(spec, arch, features),
        *devices.monitor(spec),
        *devices.sandbox(features),
        *devices.incoming(spec),
    ]

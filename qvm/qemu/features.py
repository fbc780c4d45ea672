"""What one QEMU binary can do, as data: probed once (`probe.py`), remembered, and read by the command-line builder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvm.arch import find_arch
from qvm.errors import QemuError


@dataclass(frozen=True, slots=True)
class Firmware:
    """A UEFI firmware in two flash images, both raw: the code, and the template of its variable store."""

    code: Path
    variables: Path

    def to_dict(self) -> dict[str, str]:
        return {"code": str(self.code), "variables": str(self.variables)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Firmware:
        return cls(Path(data["code"]), Path(data["variables"]))


@dataclass(frozen=True, slots=True)
class QemuFeatures:
    binary: Path
    build: str
    """Which build it is: real path, mtime (ns) and size (bytes). Keys whatever was learned by running it."""
    arch: str
    """The guest architecture it emulates: `qvm.arch.Arch.name`."""
    system: str
    """The host's `platform.system()`: Linux or Darwin."""
    host_machine: str
    """The host's `platform.machine()`."""
    version: tuple[int, int, int]
    package: str
    """The distributor's own version, such as "Debian 1:7.2+dfsg-7"; empty for plain builds."""
    machine: str
    """The versioned machine type behind the architecture's alias, such as pc-q35-7.2; empty when it has none."""
    accels: tuple[str, ...]
    """Compiled in, best first. Whether they work is another question: see accel.py."""
    devices: tuple[str, ...]
    """Those of `probe.DEVICES` it has."""
    properties: tuple[str, ...]
    """Those of `probe.PROPERTIES` it has, as device.property."""
    netdevs: tuple[str, ...]
    sandbox: bool
    """Built with seccomp filters."""
    io_uring: bool
    """Built with io_uring, and this host's kernel let it open a file that way."""
    firmware: Firmware | None = field(default=None)

    @property
    def version_text(self) -> str:
        """For people: `10.0.2 (Debian 1:10.0.2+ds-2)`."""
        number = ".".join(map(str, self.version))
        return f"{number} ({self.package})" if self.package else number

    def has(self, device: str, prop: str | None = None) -> bool:
        """Whether the device (or that property of it) exists in this build."""
        return device in self.devices if prop is None else f"{device}.{prop}" in self.properties

    def require_restore(self) -> None:
        """QemuError where a machine of this QEMU does not go on from a saved state: no fork, suspension or snapshot."""
        arch = find_arch(self.arch)
        since = arch.restores_from if arch else None
        if since is None:
            raise QemuError(f"QEMU does not restore {self.arch} machines")
        if self.version < since:
            raise QemuError(f"QEMU before {since[0]}.{since[1]} does not restore {self.arch} machines "
                            f"(this is {self.version_text})")

    def to_dict(self) -> dict[str, Any]:
        return {
            "binary": str(self.binary),
            "build": self.build,
            "arch": self.arch,
            "system": self.system,
            "host_machine": self.host_machine,
            "version": list(self.version),
            "package": self.package,
            "machine": self.machine,
            "accels": list(self.accels),
            "devices": list(self.devices),
            "properties": list(self.properties),
            "netdevs": list(self.netdevs),
            "sandbox": self.sandbox,
            "io_uring": self.io_uring,
            "firmware": self.firmware.to_dict() if self.firmware else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QemuFeatures:
        """Raises KeyError, TypeError or ValueError where `data` is not what `to_dict` makes."""
        major, minor, micro = (int(part) for part in data["version"])
        return cls(
            binary=Path(data["binary"]),
            build=str(data["build"]),
            arch=str(data["arch"]),
            system=str(data["system"]),
            host_machine=str(data["host_machine"]),
            version=(major, minor, micro),
            package=str(data["package"]),
            machine=str(data["machine"]),
            accels=tuple(map(str, data["accels"])),
            devices=tuple(map(str, data["devices"])),
            properties=tuple(map(str, data["properties"])),
            netdevs=tuple(map(str, data["netdevs"])),
            sandbox=bool(data["sandbox"]),
            io_uring=bool(data["io_uring"]),
            firmware=Firmware.from_dict(data["firmware"]) if data["firmware"] else None,
        )

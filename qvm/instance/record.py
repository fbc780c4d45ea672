"""What qvm remembers of an instance: two versioned JSON files, each written atomically.

`instance.json` is the definition (written by the command that holds the instance's lock); `run.json` tells which
QEMU process serves it (written by the supervisor, removed when QEMU has gone). Neither stores a state: whether the
instance runs is derived, see `qvm.instance.store.find_run`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvm.config.model import Config, Mount
from qvm.config.ports import parse_rule
from qvm.errors import HostError, InstanceStateError
from qvm.instance.mounted import MountedFolder
from qvm.paths import replace_file
from qvm.process import Identity

VERSION = 1
_LISTS = ("dns", "registry_mirrors", "insecure_registries", "ca_certs", "k3s_args")
"""Fields of Config that are tuples of text."""


@dataclass(frozen=True, slots=True)
class GuestUser:
    """The account made in the guest: the host user's name and ids."""

    name: str
    uid: int
    gid: int
    home: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Record:
    """The definition of one instance."""

    uuid: str
    config: Config
    image_id: str
    mac: str
    user: GuestUser
    ssh_port: int
    """The port last used; kept where it is still free, so that `ssh-config` output stays valid."""
    accel: str
    """The accelerator chosen at the last start: kvm, hvf or tcg."""
    created: float
    """Seconds since the epoch."""
    notes: tuple[str, ...] = ()
    """What the last start had to tell."""
    network_number: int = 0
    """Its place in the network that instances share (`qvm.instance.netaddr`); 0: none yet."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "uuid": self.uuid,
            "config": config_to_dict(self.config),
            "image_id": self.image_id,
            "mac": self.mac,
            "user": self.user.to_dict(),
            "ssh_port": self.ssh_port,
            "accel": self.accel,
            "created": self.created,
            "notes": list(self.notes),
            "network_number": self.network_number,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        return cls(
            uuid=data["uuid"],
            config=config_from_dict(data["config"]),
            image_id=data["image_id"],
            mac=data["mac"],
            user=GuestUser(**data["user"]),
            ssh_port=int(data["ssh_port"]),
            accel=data["accel"],
            created=float(data["created"]),
            notes=tuple(data["notes"]),
            network_number=int(data.get("network_number", 0)),
        )


@dataclass(frozen=True, slots=True)
class Run:
    """The QEMU process that serves an instance now."""

    qemu: Identity
    ssh_port: int
    accel: str
    started: float
    """Seconds since the epoch."""
    runtime_version: str = ""
    ready: bool = False
    """Every requirement was met once since this QEMU started."""
    mounts: tuple[MountedFolder, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "qemu": self.qemu.to_dict(),
            "ssh_port": self.ssh_port,
            "accel": self.accel,
            "started": self.started,
            "runtime_version": self.runtime_version,
            "ready": self.ready,
            "mounts": [each.to_dict() for each in self.mounts],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Run:
        return cls(
            qemu=Identity.from_dict(data["qemu"]),
            ssh_port=int(data["ssh_port"]),
            accel=data["accel"],
            started=float(data["started"]),
            runtime_version=data["runtime_version"],
            ready=bool(data["ready"]),
            mounts=tuple(MountedFolder.from_dict(each) for each in data.get("mounts", ())),
        )


def config_to_dict(config: Config) -> dict[str, Any]:
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    values["mounts"] = [mount.to_dict() for mount in config.mounts]
    values["port_forwards"] = [str(rule) for rule in config.port_forwards]
    for name in _LISTS:
        values[name] = list(values[name])
    return values


def config_from_dict(data: dict[str, Any]) -> Config:
    known = {item.name for item in dataclasses.fields(Config)}
    values = {key: value for key, value in data.items() if key in known}
    values["mounts"] = tuple(Mount.from_dict(mount) for mount in data["mounts"])
    values["port_forwards"] = tuple(parse_rule(rule) for rule in data.get("port_forwards", ()))
    values |= {name: tuple(data[name]) for name in _LISTS if name in data}
    return Config(**values)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace `path` atomically (0600), so that a reader sees the old or the new content and a crash leaves one."""
    try:
        replace_file(path, f"{json.dumps(data, indent=1)}\n".encode())
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}", hint="free some space or set QVM_HOME") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a file `write_json` made; None where there is none; InstanceStateError where it is damaged."""
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InstanceStateError(
            f"{path} cannot be read: {error}", hint="`qvm delete -f` removes the instance; its data disk stays"
        ) from error
    if not isinstance(data, dict) or not isinstance(data.get("version"), int):
        raise InstanceStateError(
            f"{path} is not a file of qvm's", hint="`qvm delete -f` removes the instance; its data disk stays"
        )
    if data["version"] > VERSION:
        raise InstanceStateError(f"{path} was written by a newer qvm", hint="update qvm: pip install --upgrade qvm")
    return data

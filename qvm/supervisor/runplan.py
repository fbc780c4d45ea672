"""The machine of one `qvm run`, completely decided; pure data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvm.seed.data import SeedData

FOLDER = "/_QVM_RUN_FOLDER_"
"""Stands in a plan for the folder of the run."""


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A machine completely decided, in plain JSON values: the next run of the same kind finds it ready."""

    argv: tuple[str, ...]
    """QEMU's command line; `FOLDER` stands for the run's folder."""
    features: dict[str, Any]
    """QemuFeatures.to_dict()."""
    warm: str | None
    """The warm image's folder; None: boot."""
    root: str
    """What the root disk is an overlay on."""
    root_format: str
    root_size: int
    """Bytes, as all sizes here."""
    data: str | None
    """What the data disk is an overlay on; None: an empty one."""
    data_size: int
    cpus: int
    memory: int
    plug: int
    """Memory to be plugged in after the fork."""
    runtime: str
    user: dict[str, Any]
    """GuestUser.to_dict()."""
    hostname: str
    mounts: tuple[dict[str, Any], ...]
    """Mount.to_dict()."""
    dns: tuple[str, ...]
    data_folders: tuple[str, ...]
    cwd: str
    """Where commands run in the guest."""
    grow: bool = False
    """The data disk is larger than the file system on it."""
    hosts: dict[str, str] = field(default_factory=dict)
    """Name -> address: what the guest knows."""
    proxies: dict[str, str] | None = None
    """As the setting has it."""
    ca_certs: tuple[str, ...] = ()
    """Files of certificates that the guest trusts."""
    firmware_vars: str | None = None
    """What UEFI's variables begin as; None: the machine boots a kernel directly."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunPlan:
        """Raises TypeError where `data` is not what `to_dict` makes."""
        listed = ("argv", "mounts", "dns", "data_folders", "ca_certs")
        values: dict[str, Any] = {name: tuple(value) if name in listed else value for name, value in data.items()}
        return cls(**values)


def seed_data(plan: RunPlan, env: Mapping[str, str]) -> SeedData:
    """What the guest is to become. No SSH keys: nothing can reach its sshd."""
    import secrets
    import uuid

    from qvm.config.model import Mount
    from qvm.seed.data import SeedData

    user = plan.user
    return SeedData(
        instance_id=str(uuid.uuid4()), hostname=plan.hostname, user=str(user["name"]), uid=int(user["uid"]),
        gid=int(user["gid"]), home=str(user["home"]), shell="/bin/bash", authorized_keys=(), host_key="",
        host_key_public="", mounts=tuple(Mount.from_dict(mount) for mount in plan.mounts),
        env={**_proxies(plan), **env}, hosts=dict(plan.hosts),
        dns=plan.dns, data_folders=plan.data_folders, machine_id=secrets.token_hex(16),
    )


def _proxies(plan: RunPlan) -> dict[str, str]:
    """The guest's proxy variables; from the environment of this moment, which is no part of a plan."""
    import os

    if not plan.proxies and not any(name.lower().endswith("_proxy") for name in os.environ):
        return {}
    from qvm.runtime.network import proxy_variables

    return proxy_variables(plan.proxies, os.environ)

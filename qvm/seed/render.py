"""A seed as files: what cloud-init's NoCloud source expects, and the document our agent applies.

qvm's own images boot with cloud-init off and take everything from `qvm.json`; foreign cloud images
have cloud-init start the agent from the same disk. The templates are in `cloud-init/`; every value is put in as JSON,
which is YAML, so no value can change a file's structure.
"""

from __future__ import annotations

import json
import secrets
import time
from base64 import b64encode
from dataclasses import dataclass
from string import Template
from typing import Any, Literal
from uuid import uuid4

from qvm import paths
from qvm.agentbundle import agent_source
from qvm.errors import ConfigError
from qvm.seed.data import SeedData, validate_seed

DOCUMENT_VERSION = 1
_NAMESERVER = "10.0.2.3"
"""QEMU's own."""
_ENTROPY = 64
"""Bytes; the kernel's generator is keyed with 32."""


@dataclass(frozen=True, slots=True)
class Templates:
    """The texts that `cloud-init/` ships."""

    meta_data: str
    user_data: str
    network_config: str
    agent: bytes
    installer: bytes
    unit: bytes


def load_templates() -> Templates:
    folder = paths.share_dir("cloud-init")
    return Templates(
        meta_data=(folder / "meta-data.yaml").read_text(),
        user_data=(folder / "user-data.yaml").read_text(),
        network_config=(folder / "network-config.yaml").read_text(),
        agent=agent_source(),
        installer=(folder / "install-agent.sh").read_bytes(),
        unit=(folder / "qvm-agent.service").read_bytes(),
    )


def seed_document(data: SeedData) -> dict[str, Any]:
    """What the agent applies, from the seed or over its channel."""
    document: dict[str, Any] = {
        "version": DOCUMENT_VERSION,
        "instance_id": data.instance_id,
        "hostname": data.hostname,
        "hosts": dict(data.hosts),
        "user": {"name": data.user, "uid": data.uid, "gid": data.gid, "home": data.home, "shell": data.shell},
        "authorized_keys": list(data.authorized_keys),
        "host_key": data.host_key,
        "host_key_public": data.host_key_public,
        "env": dict(data.env),
        "dns": list(data.dns),
        "data_folders": list(data.data_folders),
        "data_disk": data.data_disk,
        "mounts": [
            {"tag": f"qvm{number}", "target": str(mount.target), "writable": mount.writable,
             **({"mmap": True} if mount.mmap else {})}
            # Outer folders first, so that none hides one mounted inside it.
            for number, mount in sorted(enumerate(data.mounts), key=lambda item: len(item[1].target.parts))
        ],
    }
    if data.machine_id:
        document["machine_id"] = data.machine_id
    return document


def fork_document(
    data: SeedData, *, data_disk: Literal["bind"] | None = None, uuid: str | None = None, mac: str | None = None
) -> dict[str, Any]:
    """What a fork of a frozen machine applies first (`AgentChannel.personalise`): the seed's document, and a section
    `fork` with what no two machines may share. Each call makes another identity, but for what `data` names.

    `data_disk` "bind": the machine was frozen with the driver taken off its data disk (freeze stage "base").
    `uuid`: the instance's, shown as the machine's product UUID; `mac` else `data.mac`.
    ConfigError with every problem where the data would break the guest.
    """
    problems = validate_seed(data)
    if problems:
        raise ConfigError(problems)
    section = {
        "clock_ns": time.time_ns(),  # put right at the moment of sending
        "entropy": b64encode(secrets.token_bytes(_ENTROPY)).decode(),
        "machine_id": data.machine_id or uuid4().hex,
        "boot_id": str(uuid4()),
        "uuid": uuid or str(uuid4()),
        "mac": (mac or data.mac).lower(),
        "data_disk": data_disk,
    }
    return {**seed_document(data), "fork": section}


def render_seed(data: SeedData, *, templates: Templates | None = None) -> dict[str, bytes]:
    """The files of the seed's ISO by name. ConfigError with every problem where the data would break the guest."""
    problems = validate_seed(data)
    if problems:
        raise ConfigError(problems)
    texts = templates or load_templates()
    document = json.dumps(seed_document(data), indent=1, sort_keys=True).encode() + b"\n"
    return {
        "meta-data": _fill(texts.meta_data, instance_id=data.instance_id, hostname=data.hostname),
        "user-data": texts.user_data.encode(),
        "network-config": _fill(
            texts.network_config, match={"macaddress": data.mac.lower()} if data.mac else {"name": "e*"},
            nameservers=list(data.dns) or [_NAMESERVER],
        ),
        "qvm.json": document,
        "agent.py": texts.agent,
        "install-agent.sh": texts.installer,
        "qvm-agent.service": texts.unit,
    }


def _fill(template: str, **values: Any) -> bytes:
    return Template(template).substitute({name: json.dumps(value) for name, value in values.items()}).encode()


"""`qvm kubernetes start|stop|reset|delete`: k3s on top of the runtime of an instance that runs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qvm.commands.start import check_name
from qvm.config.resolve import resolve_config
from qvm.config.save import save_profile
from qvm.errors import InstanceStateError
from qvm.filenames import Files
from qvm.instance.record import Record, config_to_dict
from qvm.instance.store import find_run, load_record, lock_instance, save_record
from qvm.progress import Progress
from qvm.runtime.stack import load_stack
from qvm.supervisor.client import call
from qvm.supervisor.context import runtime_context
from qvm.supervisor.launch import have_ready

ADDON = "k3s"
_DOING = {"start": "starting", "stop": "stopping", "reset": "resetting", "delete": "deleting"}


@dataclass(frozen=True, slots=True)
class KubernetesResult:
    profile: str
    action: str
    runtime_version: str
    ports: dict[str, int]
    """Name -> its number at 127.0.0.1."""
    seconds: float
    notes: list[str] = field(default_factory=list)


def start(profile: str, flags: Mapping[str, Any], *, cwd: Path, progress: Progress) -> KubernetesResult:
    """Have Kubernetes, from now on and at later starts; `flags` as those of `qvm start`."""
    return _act(profile, "start", {**flags, "kubernetes": True}, cwd=cwd, progress=progress)


def stop(profile: str, *, progress: Progress) -> KubernetesResult:
    """Stop it and its pods, until it is started or the instance is."""
    return _act(profile, "stop", {}, cwd=Path.cwd(), progress=progress)


def reset(profile: str, *, progress: Progress) -> KubernetesResult:
    """An empty cluster in the place of the one there is; images stay."""
    return _act(profile, "reset", {}, cwd=Path.cwd(), progress=progress)


def delete(profile: str, *, progress: Progress) -> KubernetesResult:
    """No Kubernetes any more, now and at later starts: the cluster and the kubeconfig's entries go."""
    return _act(profile, "delete", {}, cwd=Path.cwd(), progress=progress)


def _act(profile: str, action: str, flags: Mapping[str, Any], *, cwd: Path, progress: Progress) -> KubernetesResult:
    check_name(profile)
    began = time.monotonic()
    with lock_instance(profile, on_wait=progress.note):
        record = load_record(profile)
        if find_run(profile) is None:
            raise InstanceStateError(f"{profile!r} is not running",
                                     hint=f"qvm start {profile}{' --kubernetes' if action == 'start' else ''}")
        have_ready(profile)
        if action == "start":
            record = _enable(record, flags, cwd=cwd, progress=progress)
        with progress.step(f"{_DOING[action]} Kubernetes"):
            answer = call(Files(profile).control_socket, "addon", name=ADDON, action=action, timeout=None)
        if action == "delete":
            _keep(record, {"kubernetes": False}, cwd=cwd, progress=progress)
    for note in answer["notes"]:
        progress.note(str(note))
    return KubernetesResult(profile, action, str(answer["runtime_version"]), dict(answer["ports"]),
                            time.monotonic() - began, list(answer["notes"]))


def _enable(record: Record, flags: Mapping[str, Any], *, cwd: Path, progress: Progress) -> Record:
    """Fetch what is needed first: a start that fails for it leaves things as they are."""
    wanted = replace(record, config=_kubernetes_of(record, flags, cwd=cwd))
    load_stack(wanted.config).prepare_host(runtime_context(wanted), progress)
    return _keep(record, flags, cwd=cwd, progress=progress)


def _kubernetes_of(record: Record, flags: Mapping[str, Any], *, cwd: Path) -> Any:
    """The record's settings with only those of Kubernetes taken from what is said now: the rest waits for a restart."""
    resolved = resolve_config(record.config.profile, flags, stored=config_to_dict(record.config), cwd=cwd).config
    return replace(
        record.config, kubernetes=resolved.kubernetes, kubernetes_version=resolved.kubernetes_version,
        k3s_args=resolved.k3s_args, k3s_listen_port=resolved.k3s_listen_port,
    )


def _keep(record: Record, flags: Mapping[str, Any], *, cwd: Path, progress: Progress) -> Record:
    profile = record.config.profile
    changed = replace(record, config=_kubernetes_of(record, flags, cwd=cwd))
    for note in save_profile(resolve_config(profile, flags, stored=config_to_dict(record.config), cwd=cwd)):
        progress.note(note)
    save_record(changed)
    return changed

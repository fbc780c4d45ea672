"""`qvm status` and `qvm list`: the truth about instances, derived anew each time."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from qvm.errors import InstanceStateError
from qvm.filenames import Files
from qvm.instance.record import Record, Run
from qvm.instance.states import MANIFEST
from qvm.instance.store import find_run, list_profiles, load_record
from qvm.supervisor.launch import find_status


def status(profile: str) -> dict[str, Any]:
    """Everything there is to say about one instance, JSON-ready; sizes in bytes, times in seconds.

    `state` is running, starting, stopping, failed, stopped, suspended, or one of:
    unsupervised (QEMU runs, nobody serves its sockets and forwards; `start` mends it),
    stuck (the process lives but QEMU does not answer as this instance).
    """
    record = load_record(profile)
    run = find_run(profile)
    served = find_status(profile)
    state = _state(record, run, served)
    result = _definition(record)
    result["state"] = state
    result["notes"] = list(record.notes)
    if run is not None:
        result |= {
            "pid": run.qemu.pid,
            "uptime": max(0.0, time.time() - run.started),
            "memory_used": resident_memory(run.qemu.pid),
            "runtime_version": run.runtime_version,
            "ssh_port": run.ssh_port,
            "accel": run.accel,
        }
    if served is not None:
        result |= {key: served[key] for key in ("supervisor_pid", "requirements", "forwards", "sockets")}
        if "mounts" in served:  # absent from a supervisor of an older qvm
            result["mounts"] = served["mounts"]
        result["ports"] = served.get("ports", {})
        result["binfmt"] = served.get("binfmt")
        result["dns"] = served.get("dns", {})
        result["network"] = served.get("network", {})
        result["forward_events"] = served.get("forward_events", [])
        result["environment"] = served.get("environment", {})  # absent from a supervisor of an older qvm
    return result


def list_instances() -> list[dict[str, Any]]:
    """`status` of every instance; a damaged one is listed with state "damaged" and what is wrong."""
    rows = []
    for profile in list_profiles():
        try:
            rows.append(status(profile))
        except InstanceStateError as error:
            rows.append({"profile": profile, "state": "damaged", "error": error.message, "hint": error.hint})
    return rows


def _state(record: Record, run: Run | None, served: dict[str, Any] | None) -> str:
    if served is not None:
        return str(served["phase"])
    if run is None:
        return "suspended" if (Files(record.config.profile).suspended / MANIFEST).exists() else "stopped"
    from qvm.qemu.probe_monitor import probe_monitor

    info = probe_monitor(Files(record.config.profile).monitor_socket)
    return "unsupervised" if info is not None and info.uuid == record.uuid else "stuck"


def _definition(record: Record) -> dict[str, Any]:
    config = record.config
    files = Files(config.profile)
    return {
        "profile": config.profile,
        "arch": config.arch,
        "accel": record.accel,
        "cpus": config.cpus,
        "memory": config.memory,
        "disk": config.disk,
        "disk_used": allocated(files.root_disk) + allocated(files.data_disk),
        "image": config.image,
        "image_id": record.image_id,
        "runtime": config.runtime,
        "hostname": config.hostname,
        "user": record.user.name,
        "ssh_port": record.ssh_port,
        "mounts": [mount.to_dict() for mount in config.mounts],
        "forwards": [],
        "sockets": {},
        "folder": str(files.folder),
        "created": record.created,
    }


def allocated(path: Path) -> int:
    """Bytes a (sparse) file really takes; 0 where there is none."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def resident_memory(pid: int) -> int:
    """Bytes of RAM a process holds; on Linux from proc(5), where importing psutil would cost more than the answer."""
    if sys.platform == "linux":
        try:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            return 0
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0

"""`qvm clone`: another instance that begins with what this one is now; of a running one with what runs in it."""

from __future__ import annotations

import shutil
import time
import uuid
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from qvm import paths
from qvm.commands.prepare import check_host
from qvm.commands.results import CloneResult
from qvm.commands.start import check_name
from qvm.commands.suspend import tell_streamed
from qvm.config.context import Context
from qvm.config.model import Config
from qvm.config.save import render_profile
from qvm.config.settings import default_hostname
from qvm.errors import InstanceStateError
from qvm.filenames import Files
from qvm.instance.record import Record
from qvm.instance.states import discard_state, find_state, load_state
from qvm.instance.store import find_record, find_run, load_record, lock_instance, save_record
from qvm.progress import Progress
from qvm.runtime.stack import load_stack
from qvm.supervisor import offline
from qvm.supervisor.assemble import mac_address
from qvm.supervisor.client import call
from qvm.supervisor.launch import have_ready


def clone(source: str, target: str, *, progress: Progress) -> CloneResult:
    """Make the instance `target` a copy of `source`, which goes on undisturbed; nothing on the disks is copied.

    The copy has an identity of its own: host name, keys, ids, address. Its next start goes on where `source` is now, or
    boots, where `source` is off. InstanceStateError where there is a `target`, or something holds a host folder.
    """
    check_name(target)
    record = load_record(source)
    if source == target:
        raise InstanceStateError(f"{source!r} cannot be a copy of itself")
    began = time.monotonic()
    with ExitStack() as locks:
        for name in sorted((source, target)):  # always in this order, so that no two commands wait for each other
            locks.enter_context(lock_instance(name, on_wait=progress.note))
        config = _own_config(record.config, target)
        _make_room(config)
        try:
            report = _copy(record, target, progress)
        except BaseException:
            shutil.rmtree(Files(target).folder, ignore_errors=True)
            _remove_data(target)
            raise
        identifier = str(uuid.uuid4())
        running = find_state(Files(target).suspended) is not None
        (Files(target).config).write_text(render_profile(config), encoding="utf-8")
        save_record(replace(
            record, uuid=identifier, mac=mac_address(identifier), config=config, ssh_port=0, created=time.time(),
            notes=(), network_number=0,
        ))  # fmt: skip
    return CloneResult(target, source, running, time.monotonic() - began, float(report.get("paused", 0.0)),
                       report.get("timings", {}), tell_streamed(report, progress) if report else [])  # fmt: skip


def _own_config(config: Config, target: str) -> Config:
    context = Context(target, paths.home(), {})
    return replace(config, profile=target, hostname=default_hostname(context), ssh_port=0)


def _make_room(config: Config) -> None:
    target = config.profile
    files = Files(target)
    if find_record(target) is not None:
        raise InstanceStateError(f"there is an instance {target!r} already", hint=f"`qvm delete {target}` removes it")
    if files.data_disk.exists():
        raise InstanceStateError(f"a data disk of an earlier {target!r} is kept",
                                 hint=f"`qvm delete {target} --data` removes it")
    check_host(target, load_stack(config))
    shutil.rmtree(files.folder, ignore_errors=True)  # what an interrupted clone left
    _remove_data(target)
    for folder in (files.folder, files.profile_folder):
        paths.ensure_private_dir(folder)


def _remove_data(target: str) -> None:
    Files(target).data_disk.unlink(missing_ok=True)
    shutil.rmtree(Files(target).data_layers, ignore_errors=True)


def _copy(record: Record, target: str, progress: Progress) -> dict[str, Any]:
    """Disks, and the memory of a machine that runs or is suspended; returns the supervisor's report."""
    source = record.config.profile
    into = Files(target).suspended
    if find_run(source) is None:
        state = offline.snapshot_stopped(source, f"clone-{target}")
        folder = Files(source).snapshots / state.name
        try:
            offline.copy_disks(source, target, state.disks)
            if state.shape is not None:
                offline.copy_state(folder, target, state)
        finally:
            discard_state(folder)
        return {}
    with progress.step(f"copying {source}"):
        have_ready(source)
        report = call(Files(source).control_socket, "copy", timeout=None, name="suspended", folder=str(into))
        state = load_state(into)
        offline.copy_disks(source, target, state.disks)
        offline.adopt_state(target, state)
    return report

"""`qvm update`: the runtime's packages in a running VM; and whether there is a newer image to begin anew with."""

from __future__ import annotations

import time

from qvm.arch import find_arch
from qvm.commands.results import UpdateResult
from qvm.errors import InstanceStateError
from qvm.filenames import Files
from qvm.image.store import find_named
from qvm.instance.record import Record
from qvm.instance.store import find_run, load_record, lock_instance
from qvm.progress import Progress
from qvm.supervisor.client import call

SILENCE = 1800.0
"""Seconds; the guest fetches and unpacks packages, perhaps under software emulation."""


def update(profile: str, *, progress: Progress) -> UpdateResult:
    """Bring the runtime's packages in the VM up to date and start its services anew where any changed.

    Containers come back as their restart policy says. InstanceStateError where the VM does not run; GuestError with
    the package manager's words where the packages cannot be fetched: then nothing has changed.
    """
    record = load_record(profile)
    if find_run(profile) is None:
        raise InstanceStateError(f"{profile!r} is not running", hint=f"`qvm start {profile}` starts it")
    began = time.monotonic()
    with lock_instance(profile, on_wait=progress.note), progress.step("updating packages in the VM"):
        answer = call(Files(profile).control_socket, "update", timeout=SILENCE)
    changes = [str(line) for line in answer["changes"]]
    return UpdateResult(
        profile, changed=bool(changes), changes=changes, runtime_version=str(answer["runtime_version"]),
        newer_image=find_newer_image(record), seconds=time.monotonic() - began,
    )


def find_newer_image(record: Record) -> str | None:
    """The id of the image that its name stands for now, where that is another one than the instance began with."""
    arch = find_arch(record.config.arch)
    current = find_named(record.config.image, arch) if arch is not None else None
    return current.id if current is not None and current.id != record.image_id else None


def describe_newer_image(record: Record) -> str | None:
    """The offer in a line; None where there is nothing to offer."""
    if find_newer_image(record) is None:
        return None
    profile = record.config.profile
    return (f"{profile!r} runs on an older build of {record.config.image}; `qvm delete {profile} -f` and "
            f"`qvm start {profile}` move it to the new one, with its images and volumes")

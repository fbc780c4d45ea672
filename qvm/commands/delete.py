"""`qvm delete`: stop and remove; the data disk stays unless told otherwise."""

from __future__ import annotations

from qvm.commands.results import DeleteResult
from qvm.commands.ssh_include import settle_ssh_config
from qvm.commands.start import check_name
from qvm.commands.stop import stop_locked
from qvm.commands.update import find_newer_image
from qvm.errors import InstanceStateError, NoSuchInstanceError
from qvm.filenames import Files
from qvm.instance.netaddr import machine_socket
from qvm.instance.record import Record
from qvm.instance.store import find_record, list_profiles, lock_instance, remove_instance
from qvm.progress import Progress
from qvm.supervisor.offline import flatten_data


def delete(profile: str, *, data: bool = False, force: bool = False, progress: Progress) -> DeleteResult:
    """Remove the instance; with `data` its data disk and profile file too. `force` stops a running one at once.

    Also clears away an instance whose record is damaged, and a data disk that an earlier delete has kept.
    """
    check_name(profile)
    files = Files(profile)
    if not files.folder.exists() and not (data and files.data_disk.exists()):
        known = list_profiles()
        kept = " (its data disk is kept: --data removes it)" if files.data_disk.exists() else ""
        raise NoSuchInstanceError(f"there is no instance {profile!r}{kept}",
                                  hint=f"there are: {', '.join(known)}" if known else None)
    with lock_instance(profile, on_wait=progress.note):
        record = _stop_and_withdraw(profile, force=force, progress=progress)
        removed, kept_paths = remove_instance(profile, data=data)
        flatten_data(profile)
        for note in settle_ssh_config(wanted=record is not None and record.config.ssh_config):
            progress.note(note)
        if record is not None:
            if record.network_number:
                machine_socket(record.network_number).unlink(missing_ok=True)
            progress.note(f"deleted {profile}")
            if find_newer_image(record) is not None:
                progress.note(f"the next `qvm start {profile}` begins with a newer build of {record.config.image}")
    return DeleteResult(profile, removed, kept_paths)


def _stop_and_withdraw(profile: str, *, force: bool, progress: Progress) -> Record | None:
    try:
        record = find_record(profile)
    except InstanceStateError as error:
        progress.note(f"{error.message}; deleting it all the same")
        return None
    if record is None:
        return None
    from qvm.runtime.stack import load_stack, withdraw_absent
    from qvm.supervisor.context import runtime_context

    stop_locked(profile, force=force, progress=progress)
    runtime = load_stack(record.config)
    context = runtime_context(record)
    runtime.deactivate(context, remove=True)
    withdraw_absent(runtime, context)
    for socket in runtime.sockets:
        context.host_socket(socket.name).unlink(missing_ok=True)
    return record

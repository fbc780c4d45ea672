"""start, stop, restart, delete: the verbs that change an instance."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import click

from qvm.cli import render
from qvm.cli.invocation import Invocation, common_options
from qvm.cli.options import setting_options, take_flags
from qvm.cli.output import emit
from qvm.errors import InstanceStateError, NoSuchInstanceError, QvmError, UsageError


def working_directory() -> Path:
    """The working directory as the shell spells it, so that a path through symlinks is the same in the VM."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        raise UsageError("the working directory is gone", hint="cd to a folder that exists") from None
    spelled = Path(os.environ.get("PWD", "."))
    try:
        return spelled if spelled.is_absolute() and ".." not in spelled.parts and spelled.samefile(here) else here
    except OSError:
        return here


@click.command(epilog="Example: qvm start dev --runtime docker --cpus 4 --memory 8 --mount ~/src")
@common_options()
@setting_options
@click.option("-f", "--foreground", is_flag=True, help="Stay until the VM stops; Ctrl-C stops it.")
@click.option("--cold", is_flag=True, help="Boot anew even where a warm image could be used.")
def start(invocation: Invocation, /, *, foreground: bool, cold: bool, **options: Any) -> None:
    """Create or start a VM and wait until its containers can run.

    A VM that runs is left as it is. Settings are kept for later starts in ~/.qvm/NAME/qvm.yaml; a setting that is
    not given keeps what it was.
    """
    from qvm.supervisor.prelaunch import prelaunch

    flags = take_flags(options)
    with _signals_heeded() if foreground else nullcontext():
        with prelaunch(invocation.profile) as waiting, invocation.progress() as progress:
            from qvm.commands.start import start as do_start

            result = do_start(invocation.profile, flags, cwd=working_directory(), cold=cold, progress=progress,
                              waiting=waiting)
        emit(invocation, result, render.render_start, essential=False)
        if foreground:
            from qvm.commands.foreground import stay

            with invocation.progress() as progress:
                stay(invocation.profile, progress=progress)


def _signals_heeded() -> AbstractContextManager[None]:
    from qvm.commands.foreground import heed_signals

    return heed_signals()


@click.command(epilog="Example: qvm stop dev")
@common_options()
@click.option("-f", "--force", is_flag=True, help="Stop at once, without asking the guest.")
@click.option("--suspend", is_flag=True, help="Save what runs; the next start goes on there.")
def stop(invocation: Invocation, /, *, force: bool, suspend: bool) -> None:
    """Stop a VM: ask the guest to shut down, then force it."""
    if suspend:
        if force:
            raise UsageError("--suspend and --force exclude each other")
        from qvm.cli.saving import do_suspend

        do_suspend(invocation)
        return
    from qvm.commands.stop import stop as do_stop

    with invocation.progress() as progress:
        result = do_stop(invocation.profile, force=force, progress=progress)
    emit(invocation, result, render.render_stop, essential=False)


@click.command(epilog="Example: qvm restart dev --memory 8")
@common_options()
@setting_options
@click.option("-f", "--force", is_flag=True, help="Stop at once, without asking the guest.")
def restart(invocation: Invocation, /, *, force: bool, **options: Any) -> None:
    """Stop and start a VM, applying settings that changed."""
    from qvm.commands.restart import restart as do_restart

    flags = take_flags(options)
    with invocation.progress() as progress:
        result = do_restart(invocation.profile, flags, cwd=working_directory(), force=force, progress=progress)
    emit(invocation, result, render.render_start, essential=False)


@click.command(epilog="Example: qvm delete dev -f --data")
@common_options()
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@click.option("--data", is_flag=True, help="Delete the data disk (images, volumes) and the profile file too.")
@click.option("--all", "every", is_flag=True, help="Delete every VM.")
def delete(invocation: Invocation, /, *, force: bool, data: bool, every: bool) -> None:
    """Delete a VM. Its data disk is kept for the next start of that name unless --data."""
    if every and invocation.named is not None:
        raise UsageError("--all and a profile's name exclude each other")
    profiles = _all_profiles() if every else [invocation.profile]
    if not force and profiles:
        _ask(invocation, profiles, data=data)
    results, failures = _delete_each(invocation, profiles, data=data, force=force)
    if failures:
        raise _combine(failures)
    if every:
        emit(invocation, results, lambda done: "\n".join(map(render.render_delete, done)), essential=False)
    else:
        emit(invocation, results[0], render.render_delete, essential=False)


def _delete_each(
    invocation: Invocation, profiles: list[str], *, data: bool, force: bool
) -> tuple[list[Any], list[QvmError]]:
    """Delete what can be deleted; an error of one does not keep the others."""
    from qvm.commands.delete import delete as do_delete

    results: list[Any] = []
    failures: list[QvmError] = []
    with invocation.progress() as progress:
        for profile in profiles:
            try:
                results.append(do_delete(profile, data=data, force=force, progress=progress))
            except QvmError as error:
                failures.append(error)
    return results, failures


def _combine(failures: list[QvmError]) -> QvmError:
    if len(failures) == 1:
        return failures[0]
    return InstanceStateError(
        f"{len(failures)} VMs could not be deleted", details="\n".join(error.message for error in failures)
    )


def _all_profiles() -> list[str]:
    from qvm.instance.store import list_profiles

    return list_profiles()


def _ask(invocation: Invocation, profiles: list[str], *, data: bool) -> None:
    """Make sure; UsageError where nobody can be asked, Abort where the answer is no."""
    if invocation.json or not sys.stdin.isatty():
        raise UsageError("delete asks first, and nobody can be asked here", hint="add -f to delete without asking")
    known = _all_profiles()
    missing = [profile for profile in profiles if profile not in known]
    if missing and not data:
        raise NoSuchInstanceError(
            f"there is no instance {missing[0]!r}", hint=f"there are: {', '.join(known)}" if known else None
        )
    names = ", ".join(profiles)
    what = f"{names} and its data disk with all images and volumes" if data else f"{names} (the data disk is kept)"
    click.confirm(f"Delete {what}?", abort=True, err=True)

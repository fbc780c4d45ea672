"""status, list, logs, doctor, version: the verbs that only look."""

from __future__ import annotations

import click

from qvm.arch import names
from qvm.cli import render
from qvm.cli.invocation import Invocation, common_options, complete_profile
from qvm.cli.output import emit
from qvm.config.names import LOG_KINDS
from qvm.errors import HostError, UsageError


@click.command(epilog="Example: qvm status dev --json")
@common_options()
def status(invocation: Invocation, /) -> None:
    """Show the state of one VM, what it uses and where it is reached."""
    from qvm.commands.status import status as do_status

    emit(invocation, do_status(invocation.profile), render.render_status)


@click.command("list", epilog="Example: qvm list --json")
@common_options(name=False)
def list_instances(invocation: Invocation, /) -> None:
    """List all VMs."""
    from qvm.commands.status import list_instances as do_list

    emit(invocation, do_list(), render.render_list)


def _complete_log(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    kinds = [kind for kind in LOG_KINDS if kind.startswith(incomplete)]
    return [*complete_profile(ctx, param, incomplete), *kinds] if not ctx.params.get("words") else kinds


@click.command(epilog="Example: qvm logs dev serial -f")
@common_options(name=False)
@click.argument("words", metavar="[NAME] [KIND]", nargs=-1, shell_complete=_complete_log)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes.")
@click.option("--lines", type=click.IntRange(min=0), default=200, metavar="N", help="How many of the last lines. [200]")
def logs(invocation: Invocation, /, *, words: tuple[str, ...], follow: bool, lines: int) -> None:
    """Show a VM's logs; KIND is serial (the guest's console, the default), supervisor, runtime or boot."""
    from qvm.commands.logs import logs as do_logs

    kinds = [word for word in words if word in LOG_KINDS]
    names = [word for word in words if word not in LOG_KINDS]
    if len(kinds) > 1 or len(names) > 1:
        _reject_log_words(names, kinds)
    invocation.name(names[0] if names else None)
    found = do_logs(invocation.profile, kinds[0] if kinds else "serial", follow=follow, lines=lines)
    if invocation.json and not follow:
        emit(invocation, list(found), "\n".join)
        return
    for line in found:
        click.echo(line)


def _reject_log_words(names: list[str], kinds: list[str]) -> None:
    if len(kinds) > 1:
        raise UsageError(f"one log at a time, not {' and '.join(kinds)}")
    raise UsageError(f"{names[-1]!r} is not a log", hint=f"there are: {', '.join(LOG_KINDS)}")


@click.command(epilog="Example: qvm doctor --arch aarch64 --fix")
@common_options()
@click.option("-a", "--arch", metavar="ARCH", help="For VMs of this architecture. [the VM's, else the host's]",
              shell_complete=lambda ctx, param, incomplete: [a for a in names() if a.startswith(incomplete)])
@click.option("--fix", is_flag=True, help="Install what is missing; asks for your password where that needs root.")
def doctor(invocation: Invocation, /, *, arch: str | None, fix: bool) -> None:
    """Check what this host has and lacks, and say what mends it. Exit code 4 where something is missing."""
    from qvm.commands.doctor import doctor as do_doctor

    checks = do_doctor(invocation.named, arch_name=arch)
    if fix:
        from qvm.commands.doctor import mend

        if mend(checks, lambda command: click.echo(f"running {command}", err=True)):
            checks = do_doctor(invocation.named, arch_name=arch)
    emit(invocation, checks, render.render_checks)
    if any(check.ok is False for check in checks):
        click.get_current_context().exit(HostError.exit_code)


@click.command(epilog="Example: qvm version --json")
@common_options(name=False)
def version(invocation: Invocation, /) -> None:
    """Show the versions of qvm and what it uses."""
    from qvm.commands.version import version as do_version

    emit(invocation, do_version(), render.render_version)

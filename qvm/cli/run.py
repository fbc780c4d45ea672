"""run: one command in a throw-away VM. Exit codes are the command's own."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

import click

from qvm.cli.invocation import Invocation, common_options
from qvm.errors import UsageError

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d*)?|\.\d+)([smhd]?)")
_SETTINGS = ("image", "arch", "runtime", "accel", "cpus", "memory", "disk", "mounts", "env", "dns")


def _duration(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Seconds, or a number with s, m, h or d behind it, as timeout(1) has it."""
    if value is None:
        return None
    match = _DURATION.fullmatch(value.strip())
    if match is None or float(match[1]) == 0:
        raise click.BadParameter(f"{value!r} is not a time; write seconds, or 90s, 5m, 2h", ctx, param)
    return float(match[1]) * _UNITS[match[2]]


@click.command(
    epilog="Example: qvm run --timeout 10m -- make test",
    # Options end at the first word that is none: what follows is the command's, options included.
    context_settings={"allow_interspersed_args": False},
    options_metavar="[OPTIONS]",
)
@common_options(json=False, name=False)
@click.option("-i", "--image", metavar="NAME", help="Image, see `qvm image list`. [debian-13]")
@click.option("-a", "--arch", metavar="ARCH", help="Architecture. [host]")
@click.option("-r", "--runtime", metavar="NAME", help="What runs containers in the VM, with its client. [none]")
@click.option("-V", "--mount", "mounts", metavar="SRC[:DST][:ro][:mmap]", multiple=True,
              help="Host folder in the VM, writable unless :ro; repeatable; `none` for none. "
                   "[the working directory, at the same path]")
@click.option("--env", "env", metavar="KEY=VALUE", multiple=True, help="Environment variable; repeatable. [none]")
@click.option("--timeout", metavar="TIME", callback=_duration,
              help="End the command after TIME (seconds, or 5m, 2h): exit code 124, or 137 where it had to be killed.")
@click.option("-c", "--cpus", metavar="N", help="Virtual CPUs. [2]")
@click.option("-m", "--memory", metavar="GiB", help="Memory, in GiB or with a unit. [2GiB]")
@click.option("-d", "--disk", metavar="GiB", help="Data disk, for containers. [10GiB]")
@click.option("-n", "--dns", metavar="IP", multiple=True, help="Name server; repeatable. [the host's]")
@click.option("--accel", metavar="NAME", help="Accelerator: auto, kvm, hvf, tcg. [auto]")
@click.option("--cold", is_flag=True, help="Boot anew even where a warm image could be used.")
@click.argument("words", metavar="[--] COMMAND...", nargs=-1, type=click.UNPROCESSED)
def run(
    invocation: Invocation, /, *, words: tuple[str, ...], timeout: float | None, cold: bool, **options: Any
) -> int:
    """Run COMMAND in a throw-away VM, in the working directory, on this terminal or these pipes; nothing is left.

    The exit code is the command's. Files written to mounted folders stay, with your owner. Without COMMAND: a shell.
    """
    from qvm.cli.life import working_directory
    from qvm.commands.run import EndedError, run_on_terminal
    from qvm.commands.run_plan import Wish

    if invocation.named is not None:
        raise UsageError("run has no profile: its VM is made for one command", hint="leave out -p")
    flags = {name: list(value) if isinstance(value, tuple) else value for name in _SETTINGS
             if (value := options[name]) not in (None, ())}
    wish = Wish(flags, working_directory(), cold=cold)
    tell = _show_timings if invocation.verbose else None
    try:
        with invocation.progress() as progress:
            outcome = run_on_terminal(wish, _command(words), timeout=timeout, progress=progress, on_timings=tell)
    except EndedError as ended:
        return ended.exit_code
    if outcome.timed_out and not invocation.quiet:
        click.echo(f"qvm: {words[0]} was ended after {timeout:g} s", err=True)
    return outcome.exit_code


def _command(words: tuple[str, ...]) -> list[str]:
    if words:
        return list(words)
    if not sys.stdin.isatty():
        raise UsageError("there is no command to run", hint="qvm run -- COMMAND...")
    return ["/bin/bash", "-l"]


def _show_timings(timings: Mapping[str, float]) -> None:
    parts = [f"{name} {seconds * 1000:.0f} ms" for name, seconds in timings.items()]
    click.echo(f"qvm: {', '.join(parts)}", err=True)

"""suspend, resume, snapshot, clone: the verbs that keep a moment of a VM."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

from qvm.cli import render
from qvm.cli.invocation import Invocation, common_options, complete_profile
from qvm.cli.lazy import AliasGroup
from qvm.cli.output import emit
from qvm.errors import UsageError
from qvm.units import format_duration, format_size

_ALIASES = {"ls": "list", "rm": "delete", "remove": "delete"}


@click.command(epilog="Example: qvm suspend dev")
@common_options()
def suspend(invocation: Invocation, /) -> None:
    """Save a running VM with all that runs in it, and end it. `qvm resume` (or start) goes on there."""
    do_suspend(invocation)


def do_suspend(invocation: Invocation) -> None:
    """`qvm suspend` and `qvm stop --suspend`."""
    from qvm.commands.suspend import suspend as run

    with invocation.progress() as progress:
        result = run(invocation.profile, progress=progress)
    emit(invocation, result, render_suspend, essential=False)


@click.command(epilog="Example: qvm resume dev")
@common_options()
def resume(invocation: Invocation, /) -> None:
    """Go on with a suspended VM."""
    from qvm.supervisor.prelaunch import prelaunch

    with prelaunch(invocation.profile) as waiting, invocation.progress() as progress:
        from qvm.commands.suspend import resume as run

        result = run(invocation.profile, progress=progress, waiting=waiting)
    emit(invocation, result, render.render_start, essential=False)


@click.command(epilog="Example: qvm clone dev dev2")
@common_options(name=False)
@click.argument("source", metavar="NAME", shell_complete=complete_profile)
@click.argument("target", metavar="NEW")
def clone(invocation: Invocation, /, *, source: str, target: str) -> None:
    """Make a copy of a VM, running or not: its disks, and what runs in it, with an identity of its own.

    The copy takes no space until one of the two changes. `qvm start NEW` goes on with it.
    """
    from qvm.commands.clone import clone as run

    with invocation.progress() as progress:
        result = run(source, target, progress=progress)
    emit(invocation, result, render_clone, essential=False)


@click.group(cls=AliasGroup, aliases=_ALIASES, no_args_is_help=False, epilog="Example: qvm snapshot create dev before")
def snapshot() -> None:
    """Keep moments of a VM and go back to them."""


_words = click.argument("words", metavar="[NAME] SNAPSHOT", nargs=-1)


def _split(invocation: Invocation, words: Sequence[str]) -> str:
    """The snapshot's name, which comes last; the profile's may come before it."""
    if not 1 <= len(words) <= 2:
        raise UsageError("the name of a snapshot is missing" if not words else f"what is {words[2]!r}?",
                         hint="qvm snapshot create dev before")
    if len(words) == 2:
        invocation.name(words[0])
    return words[-1]


@snapshot.command(epilog="Example: qvm snapshot create dev before")
@common_options(name=False)
@_words
def create(invocation: Invocation, /, *, words: Sequence[str]) -> None:
    """Remember this moment: disks, and what runs. A running VM stands still for a fraction of a second."""
    from qvm.commands.snapshot import create as run

    name = _split(invocation, words)
    with invocation.progress() as progress:
        result = run(invocation.profile, name, progress=progress)
    emit(invocation, result, render_snapshot, essential=False)


@snapshot.command(epilog="Example: qvm snapshot restore dev before")
@common_options(name=False)
@_words
def restore(invocation: Invocation, /, *, words: Sequence[str]) -> None:
    """Go back to a snapshot. What is now is lost unless a snapshot remembers it."""
    from qvm.supervisor.prelaunch import Prelaunched

    name = _split(invocation, words)
    with Prelaunched() as waiting, invocation.progress() as progress:
        from qvm.commands.snapshot import restore as run

        result = run(invocation.profile, name, progress=progress, waiting=waiting)
    emit(invocation, result, render_snapshot, essential=False)


@snapshot.command(epilog="Example: qvm snapshot delete dev before")
@common_options(name=False)
@_words
def delete(invocation: Invocation, /, *, words: Sequence[str]) -> None:
    """Forget a snapshot."""
    from qvm.commands.snapshot import delete as run

    name = _split(invocation, words)
    with invocation.progress() as progress:
        result = run(invocation.profile, name, progress=progress)
    emit(invocation, result, render_snapshot, essential=False)


@snapshot.command("list", epilog="Example: qvm snapshot list dev --json")
@common_options()
def list_snapshots(invocation: Invocation, /) -> None:
    """List a VM's snapshots."""
    from qvm.commands.snapshot import list_all

    emit(invocation, list_all(invocation.profile), render_snapshots)


def render_suspend(result: Any) -> str:
    if not result.changed:
        return f"{result.profile} is suspended already"
    return f"{result.profile} suspended after {format_duration(result.seconds)}; `qvm resume {result.profile}` goes on"


def render_clone(result: Any) -> str:
    how = f"goes on where {result.source} was" if result.running else "boots it"
    return f"{result.profile} is a copy of {result.source}; `qvm start {result.profile}` {how}"


def render_snapshot(result: Any) -> str:
    took = format_duration(result.seconds)
    if result.action == "create":
        still = f", standing still for {result.paused * 1000:.0f} ms" if result.paused else ""
        return f"snapshot {result.snapshot} of {result.profile} made in {took}{still}"
    if result.action == "delete":
        return f"snapshot {result.snapshot} of {result.profile} deleted"
    state = "runs again as" if result.running else "is off, its disks as"
    return f"{result.profile} {state} in snapshot {result.snapshot} after {took}"


def render_snapshots(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "There are no snapshots."
    return render.table(
        ["SNAPSHOT", "CREATED", "HOLDS", "SIZE"],
        [[row["name"], time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["created"])),
          "disks and memory" if row["running"] else "disks", format_size(row["size"])] for row in rows],
    )

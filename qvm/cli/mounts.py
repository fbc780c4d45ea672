"""mounts: which folders of the host are in the VM, and changing that while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from qvm.cli.actions import ACTIONS, split_action
from qvm.cli.invocation import Invocation, common_options, complete_profile
from qvm.cli.life import working_directory
from qvm.cli.output import emit
from qvm.errors import UsageError

if TYPE_CHECKING:
    from qvm.commands.mounts import MountsResult


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """Profiles and actions; folders to add; what is mounted, to remove."""
    from click.shell_completion import CompletionItem

    words: tuple[str, ...] = ctx.params.get("words") or ()
    action = next((word for word in words[:2] if word in ACTIONS), None)
    if action is not None and ACTIONS[action] == "add":
        return [CompletionItem(incomplete, type="dir")]
    if action is not None:
        from qvm.instance.store import find_record

        name = ctx.params.get("profile_option") or (words[0] if words[0] not in ACTIONS else Invocation().profile)
        record = find_record(name)
        return [str(mount.target) for mount in (record.config.mounts if record else ())
                if str(mount.target).startswith(incomplete)]
    if words:
        return [word for word in ("add", "rm") if word.startswith(incomplete)]
    return [*complete_profile(ctx, param, incomplete), *(word for word in ("add", "rm") if word.startswith(incomplete))]


@click.command(epilog="Example: qvm mounts add ~/src:/src:ro -p dev", options_metavar="[OPTIONS]")
@common_options(name=False)
@click.argument("words", metavar="[NAME] [add SRC[:DST][:ro]... | rm FOLDER...]", nargs=-1, shell_complete=_complete)
@click.option("-f", "--force", is_flag=True, help="rm: also what something in the VM uses.")
@click.option("--save-config/--no-save-config", default=True, help="Keep it in the profile file. [kept]")
def mounts(invocation: Invocation, /, *, words: tuple[str, ...], force: bool, save_config: bool) -> None:
    """Show which folders of the host are mounted in a VM; add and remove some, running or not.

    \b
    add ~/src                 at the same path, writable
    add ~/src:/src:ro         at /src, read-only: the host refuses writes
    rm /src                   by its place in the VM, or by its folder on the host
    """
    from qvm.commands.mounts import add_mounts, remove_mounts
    from qvm.commands.mounts import mounts as show

    action, folders = split_action(
        invocation, words, verb="mounts", thing="folder", example="~/src", does="mounts it"
    )
    if force and action != "rm":
        raise UsageError("--force is for `rm`")
    if action is None:
        emit(invocation, show(invocation.profile), render_mounts)
    elif action == "add":
        emit(invocation, add_mounts(invocation.profile, folders, save=save_config, cwd=working_directory()),
             render_mounts, essential=False)
    else:
        emit(invocation, remove_mounts(invocation.profile, folders, save=save_config, force=force,
                                       cwd=working_directory()), render_mounts, essential=False)


def render_mounts(result: MountsResult) -> str:
    from qvm.cli.render import table

    rows = [_row(entry) for entry in result.mounts]
    header = ("HOST", "VM", "ACCESS", "TYPE", "STATE")
    text = table(header, rows) if rows else f"Nothing is mounted in {result.profile}."
    return "\n".join([text, *result.notes])


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    reason = f": {entry['reason']}" if entry["reason"] else ""
    access = "writable" if entry["writable"] else "read-only"
    return str(entry["source"]), str(entry["target"]), access, str(entry["type"]), f"{entry['state']}{reason}"

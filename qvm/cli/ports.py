"""ports: what of the VM is reached at the host, and the rules for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from qvm.cli.actions import split_action
from qvm.cli.invocation import Invocation, common_options, complete_profile
from qvm.cli.life import working_directory
from qvm.cli.output import emit

if TYPE_CHECKING:
    from qvm.commands.ports import PortsResult


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    words = ctx.params.get("words") or ()
    if words:
        return []
    return [*complete_profile(ctx, param, incomplete), *(word for word in ("add", "rm") if word.startswith(incomplete))]


@click.command(epilog="Example: qvm ports add 8080:80 -p dev", options_metavar="[OPTIONS]")
@common_options(name=False)
@click.argument("words", metavar="[NAME] [add|rm RULE...]", nargs=-1, shell_complete=_complete)
@click.option("--save-config/--no-save-config", default=True, help="Keep the rules in the profile file. [kept]")
def ports(invocation: Invocation, /, *, words: tuple[str, ...], save_config: bool) -> None:
    """Show what of a VM is reached at the host's ports and sockets; add and remove rules, running or not.

    \b
    8080:80                  port 80 of the VM at 127.0.0.1:8080
    0.0.0.0:8080:80          at every address of this host
    8000-8010:9000-9010/udp  ranges; UDP
    ~/db.sock:5432           at a unix socket; a path on the right is a socket in the VM
    reverse:5000:5000        port 5000 of this host inside the VM
    ignore:9000              not at all

    A new rule goes before those there are; the first that matches decides.
    """
    from qvm.commands.ports import add_rules, remove_rules
    from qvm.commands.ports import ports as show

    action, rules = split_action(
        invocation, words, verb="ports", thing="rule", example="8080:80", does="adds a rule"
    )
    if action is None:
        emit(invocation, show(invocation.profile), render_ports)
        return
    do = add_rules if action == "add" else remove_rules
    result = do(invocation.profile, rules, save=save_config, cwd=working_directory())
    emit(invocation, result, render_ports, essential=False)


def render_ports(result: PortsResult) -> str:
    from qvm.cli.render import table

    rows = [_row(entry) for entry in result.forwards]
    parts = [table(("HOST", "VM", "STATE", "RULE"), rows)] if rows else [f"Nothing of {result.profile} is forwarded."]
    hidden = [rule for rule in result.rules if rule.startswith("ignore:")]
    parts += [f"not forwarded: {', '.join(hidden)}"] if hidden else []
    return "\n".join([*parts, *result.notes])


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
    udp = "/udp" if entry["protocol"] == "udp" else ""
    way = {"user-network": " by the user network", "reverse": " from the VM to the host"}.get(entry["path"] or "", "")
    state = f"{entry['state']}{way if entry['state'] == 'forwarding' else ''}"
    reason = f": {entry['reason']}" if entry["reason"] else ""
    return f"{entry['host']}{udp}", f"{entry['guest']}{udp}", state + reason, str(entry["rule"] or "")

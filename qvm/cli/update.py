"""update: the verb that renews what is in a VM."""

from __future__ import annotations

from typing import Any

import click

from qvm.cli.invocation import Invocation, common_options
from qvm.cli.output import emit


@click.command(epilog="Example: qvm update dev")
@common_options()
def update(invocation: Invocation, /) -> None:
    """Update the runtime's packages in a VM.

    Services are started anew where something changed, and containers come back as their restart policy says.
    """
    from qvm.commands.update import update as do_update

    with invocation.progress() as progress:
        result = do_update(invocation.profile, progress=progress)
    emit(invocation, result, render_update)


def render_update(result: Any) -> str:
    if not result.changes:
        lines = [f"{result.profile} is up to date ({result.runtime_version})"]
    else:
        lines = [f"{result.profile} is updated ({result.runtime_version})", *(f"  {line}" for line in result.changes)]
    if result.newer_image is not None:
        lines.append(f"  a newer image is there: `qvm delete {result.profile} -f` and `qvm start {result.profile}` "
                     "move to it, with images and volumes")
    return "\n".join(lines)

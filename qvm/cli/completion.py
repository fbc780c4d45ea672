"""completion: the script that teaches a shell qvm's verbs, flags, profiles, runtimes and images."""

from __future__ import annotations

import click

from qvm.cli.lazy import suggest
from qvm.errors import UsageError

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_QVM_COMPLETE"


@click.command(epilog='Example: eval "$(qvm completion bash)"')
@click.argument(
    "shell", metavar="bash|zsh|fish",
    shell_complete=lambda ctx, param, incomplete: [name for name in SHELLS if name.startswith(incomplete)],
)  # fmt: skip
def completion(shell: str) -> None:
    """Print the completion script of a shell."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if shell not in SHELLS or kind is None:
        raise UsageError(f"there is no completion for {shell!r}{suggest(shell, SHELLS)}",
                         hint=f"there is one for {', '.join(SHELLS)}")
    root = click.get_current_context().find_root().command
    click.echo(kind(root, {}, "qvm", VARIABLE).source())

"""ssh, ssh-config, nerdctl: the verbs that go into the guest. Exit codes are the guest command's own."""

from __future__ import annotations

import click

from qvm.cli.invocation import Invocation, common_options, complete_profile
from qvm.cli.life import working_directory
from qvm.cli.output import emit
from qvm.errors import UsageError

_REST = "qvm.rest"


class RestCommand(click.Command):
    """A command that keeps everything behind the first `--` untouched, and apart from its own arguments."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own, rest = args, []
        if "--" in args:
            own, rest = args[: args.index("--")], args[args.index("--") + 1 :]
        ctx.meta[_REST] = rest
        return super().parse_args(ctx, own)


@click.command(cls=RestCommand, epilog="Example: qvm ssh dev -- uname -a", options_metavar="[OPTIONS]")
@common_options(json=False, name=False)
@click.option("-A", "agent", is_flag=True, help="Let the guest use your SSH agent.")
@click.option("-t/-T", "--tty/--no-tty", "tty", default=None, help="With a terminal, or without. [where ours is one]")
@click.argument("words", metavar="[NAME] [-- COMMAND...]", nargs=-1, shell_complete=complete_profile)
def ssh(invocation: Invocation, /, *, agent: bool, tty: bool | None, words: tuple[str, ...]) -> int:
    """Open a shell in a VM, or run COMMAND there; in the working directory where that is mounted."""
    from qvm.commands.ssh import ssh as do_ssh

    if len(words) > 1:
        raise UsageError(
            f"{words[1]!r} is one word too many", hint=f"a command goes behind --: qvm ssh {words[0]} -- {words[1]}"
        )
    invocation.name(words[0] if words else None)
    rest: list[str] = click.get_current_context().meta[_REST]
    return do_ssh(invocation.profile, rest, cwd=working_directory(), agent=agent, tty=tty)


@click.command("ssh-config", epilog="Example: qvm ssh-config dev >> ~/.ssh/config")
@common_options()
def ssh_config(invocation: Invocation, /) -> None:
    """Print a block for ~/.ssh/config; the host key is pinned."""
    from qvm.commands.ssh import ssh_config as do_ssh_config

    emit(invocation, do_ssh_config(invocation.profile), lambda text: text.rstrip("\n"))


@click.command(
    epilog="Example: qvm nerdctl run --rm -p 8080:80 IMAGE",
    # qvm's own options end at the first word it does not know: what follows is nerdctl's, -p included.
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
    options_metavar="[-p NAME]",
)
@common_options(json=False, name=False)
@click.argument("words", metavar="[--] ARGS...", nargs=-1, type=click.UNPROCESSED)
def nerdctl(invocation: Invocation, /, *, words: tuple[str, ...]) -> int:
    """Run nerdctl in a VM. Everything from the first word on is nerdctl's; `--` ends qvm's options before it.

    `qvm nerdctl install [--path FILE] [--force]` makes a program `nerdctl` for this host that does the same.
    """
    if words[:1] == ("install",):
        _install(invocation, list(words[1:]))
        return 0
    from qvm.commands.ssh import run_client

    return run_client(invocation.profile, "nerdctl", list(words), cwd=working_directory())


def _install(invocation: Invocation, words: list[str]) -> None:
    from pathlib import Path

    from qvm.commands.alias import install_alias

    path: Path | None = None
    force = False
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name == "--path" and (equals or words):
            path = Path(value if equals else words.pop(0)).expanduser()
        elif word in ("-f", "--force"):
            force = True
        else:
            raise UsageError(f"nerdctl install does not take {word!r}",
                             hint="qvm nerdctl install [--path FILE] [--force]")
    made = install_alias("nerdctl", invocation.profile, path=path, force=force)
    for line in made.lines():
        click.echo(line)

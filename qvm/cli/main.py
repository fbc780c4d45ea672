"""The command line: the list of verbs, and the one place where every outcome becomes an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from qvm.cli.invocation import Invocation, group_options
from qvm.cli.lazy import Interrupted, LazyGroup, Verb
from qvm.cli.output import report_bug, report_error, report_interrupt
from qvm.errors import QvmError, UsageError

VERBS = {
    "start": Verb("qvm.cli.life", "start", "Create or start a VM; wait until its containers can run."),
    "stop": Verb("qvm.cli.life", "stop", "Stop a VM."),
    "restart": Verb("qvm.cli.life", "restart", "Stop and start a VM, applying changed settings."),
    "delete": Verb("qvm.cli.life", "delete", "Delete a VM; its data disk stays unless --data."),
    "run": Verb("qvm.cli.run", "run", "Run one command in a throw-away VM; nothing is left."),
    "suspend": Verb("qvm.cli.saving", "suspend", "Save a running VM and end it."),
    "resume": Verb("qvm.cli.saving", "resume", "Go on with a suspended VM."),
    "snapshot": Verb("qvm.cli.saving", "snapshot", "Keep moments of a VM and go back to them."),
    "clone": Verb("qvm.cli.saving", "clone", "Make a copy of a VM, running or not."),
    "status": Verb("qvm.cli.show", "status", "Show the state of one VM."),
    "list": Verb("qvm.cli.show", "list_instances", "List all VMs.", ("ls",)),
    "ssh": Verb("qvm.cli.guest", "ssh", "Open a shell or run a command in a VM.", ("exec", "x")),
    "ssh-config": Verb("qvm.cli.guest", "ssh_config", "Print a block for ~/.ssh/config."),
    "nerdctl": Verb("qvm.cli.guest", "nerdctl", "Run nerdctl in a VM.", ("n",)),
    "ports": Verb("qvm.cli.ports", "ports", "Show, add and remove forwarded ports."),
    "mounts": Verb("qvm.cli.mounts", "mounts", "Show, add and remove mounted folders."),
    "kubernetes": Verb("qvm.cli.kubernetes", "kubernetes", "Start, stop, reset or delete Kubernetes in a VM.",
                       ("k8s", "kube", "k3s")),
    "update": Verb("qvm.cli.update", "update", "Update the runtime's packages in a VM."),
    "image": Verb("qvm.cli.image", "image", "List, build, fetch and remove images."),
    "logs": Verb("qvm.cli.show", "logs", "Show a VM's logs."),
    "doctor": Verb("qvm.cli.show", "doctor", "Check what this host has and lacks."),
    "version": Verb("qvm.cli.show", "version", "Show versions."),
    "completion": Verb("qvm.cli.completion", "completion", "Print a shell's completion script."),
}

# Exit code of a program that SIGPIPE ended, as shells report it.
BROKEN_PIPE = 128 + 13
INTERRUPTED = 130


@click.group(
    cls=LazyGroup,
    verbs=VERBS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: qvm start --runtime docker --cpus 4 --memory 8",
)
@click.version_option(package_name="qvm", prog_name="qvm")
@group_options
def root() -> None:
    """Linux VMs with containers in them, straight on QEMU."""


def run(argv: Sequence[str]) -> int:
    """Run one command line; returns the exit code. Nothing but Python's own exits escapes."""
    invocation = Invocation(json=_wants_json(argv))
    try:
        code = root.main(args=list(argv) or ["--help"], prog_name="qvm", standalone_mode=False, obj=invocation)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.UsageError as error:
        return report_error(_as_usage_error(error), json=invocation.json)
    except click.ClickException as error:
        return report_error(QvmError(error.format_message()), json=invocation.json)
    except (click.Abort, Interrupted, KeyboardInterrupt):
        report_interrupt()
        return INTERRUPTED
    except QvmError as error:
        return report_error(error, json=invocation.json)
    except BrokenPipeError:
        # Python would flush again while it ends and complain: give it something that takes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        return report_bug(error, json=invocation.json, verbose=invocation.verbose > 0)


def _wants_json(argv: Sequence[str]) -> bool:
    """Whether --json was asked for, known even where the command line cannot be parsed."""
    own = list(argv[: argv.index("--")]) if "--" in argv else list(argv)
    verb = next((word for word in own if word in ("nerdctl", "n")), None)
    return "--json" in (own[: own.index(verb)] if verb else own)


def _as_usage_error(error: click.UsageError) -> UsageError:
    """click's complaint in our words: the nearest option, and where to read more."""
    near: Sequence[str] = getattr(error, "possibilities", None) or ()
    where = error.ctx.command_path if error.ctx is not None else "qvm"
    hint = f"`{where} --help` shows what there is"
    if isinstance(error, click.NoSuchOption):
        message = f"unknown option {error.option_name}" + (f"; did you mean {sorted(near)[0]}?" if near else "")
    else:
        message = error.format_message().rstrip(".")
        message = message[:1].lower() + message[1:]
    return UsageError(message, hint=hint)

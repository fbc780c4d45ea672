"""kubernetes: k3s in a VM that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qvm.cli.invocation import Invocation, common_options
from qvm.cli.lazy import AliasGroup
from qvm.cli.life import working_directory
from qvm.cli.options import some_setting_options, take_flags
from qvm.cli.output import emit
from qvm.units import format_duration

if TYPE_CHECKING:
    from qvm.commands.kubernetes import KubernetesResult

_ALIASES = {"rm": "delete", "remove": "delete", "up": "start", "down": "stop"}
_DONE = {"start": "runs", "stop": "is stopped", "reset": "is new", "delete": "is deleted"}


@click.group(cls=AliasGroup, aliases=_ALIASES, no_args_is_help=False, epilog="Example: qvm kubernetes start dev")
def kubernetes() -> None:
    """Kubernetes (k3s) in a VM that runs; `qvm start --kubernetes` makes one that has it."""


@kubernetes.command(epilog="Example: qvm kubernetes start dev --kubernetes-version v1.34")
@common_options()
@some_setting_options("kubernetes_version", "k3s_args", "k3s_listen_port")
def start(invocation: Invocation, /, **options: Any) -> None:
    """Have Kubernetes in a VM, now and at later starts; wait until its node is Ready."""
    from qvm.commands.kubernetes import start as run

    flags = take_flags(options)
    with invocation.progress() as progress:
        result = run(invocation.profile, flags, cwd=working_directory(), progress=progress)
    emit(invocation, result, render, essential=False)


@kubernetes.command(epilog="Example: qvm kubernetes stop dev")
@common_options()
def stop(invocation: Invocation, /) -> None:
    """Stop it with all its pods, until the next start."""
    _run(invocation, "stop")


@kubernetes.command(epilog="Example: qvm kubernetes reset dev")
@common_options()
def reset(invocation: Invocation, /) -> None:
    """Begin with an empty cluster; images stay."""
    _run(invocation, "reset")


@kubernetes.command(epilog="Example: qvm kubernetes delete dev")
@common_options()
def delete(invocation: Invocation, /) -> None:
    """Remove it from a VM, its cluster and the kubeconfig's entries included."""
    _run(invocation, "delete")


def _run(invocation: Invocation, action: str) -> None:
    from qvm.commands import kubernetes as commands

    with invocation.progress() as progress:
        result = getattr(commands, action)(invocation.profile, progress=progress)
    emit(invocation, result, render, essential=False)


def render(result: KubernetesResult) -> str:
    line = f"Kubernetes in {result.profile} {_DONE[result.action]} ({format_duration(result.seconds)})"
    port = result.ports.get("kubernetes")
    return f"{line}\n  {result.runtime_version}, API at https://127.0.0.1:{port}" if port else line

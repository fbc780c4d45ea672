"""The contract of a runtime plugin: what qvm asks of docker, containerd and whatever comes.

A plugin is a subclass of `Runtime`, found through the entry-point group `qvm.runtimes` (its entry-point name is the
word users type after `--runtime`). It imports `qvm.runtime.*`, `qvm.errors` and nothing else of qvm. Guest work goes
through `Guest`; host work (contexts, configuration files) happens in `activate` and `deactivate`.

Order of calls at a start: `provision` (every start, idempotent), `start`, then `ready` until it returns True, then,
once the host sockets answer, `activate`. At a stop: `deactivate`, `stop`. At a delete: `teardown`.

A runtime that runs may be frozen with its machine, and go on in any number of others: `before_freeze` once it is ready,
in a machine that belongs to nobody, with a blank data disk; `after_fork` instead of `provision`, `start` and `ready`
in each fork, which has its user, its host name and everything else by then.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from qvm.execresult import ExecResult as ExecResult


class Guest(Protocol):
    """Commands in the guest, as root, over the agent."""

    async def exec(
        self,
        argv: Sequence[str],
        *,
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        check: bool = True,
    ) -> ExecResult:
        """Run `argv` to its end; GuestCommandError on a non-zero exit when `check`, DeadlineError after `timeout` s."""

    async def write_file(self, path: PurePosixPath, data: bytes, *, mode: int = 0o644) -> bool:
        """Write a file atomically, parents made; True where the content or mode differed from before."""

    async def track_id(self, name: str, *, file: PurePosixPath, process: str) -> int:
        """For `before_freeze`: each fork shall have another id (of 128 bits) than the one in `file`, there and in the
        memory of the processes called `process`. Returns in how many places of that it is found; 0 without the file.
        """

    @property
    def stale_ids(self) -> tuple[str, ...]:
        """For `after_fork`: the names of tracked ids that a running program still has as they were."""


@dataclass(frozen=True, slots=True)
class HostSocket:
    """A guest socket that the host gets at ~/.qvm/<profile>/<name>.sock."""

    name: str
    guest_path: PurePosixPath
    rehearsal: bytes = b""
    """What a client may ask first, answered by a connection of its own that ends. Said once, unheard, to a runtime that
    goes on from a saved state: emulated code that has not run since is slow the first time."""


@dataclass(frozen=True, slots=True)
class RuntimeContext:
    """What a plugin may know of the instance it serves."""

    profile: str
    folder: Path
    """~/.qvm/<profile>: where the host sockets are."""
    state_folder: Path
    """A host folder of this instance for the plugin's own small state files."""
    user: str
    """The user in the guest."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The profile file's section named like the runtime."""
    env: Mapping[str, str] = field(default_factory=dict)
    """The host's environment as far as it names configuration (DOCKER_CONFIG, HOME, KUBECONFIG)."""

    def host_socket(self, name: str) -> Path:
        return self.folder / f"{name}.sock"


class Runtime(ABC):
    """One runtime. Instances carry no state: everything lives in the guest or in `state_folder`."""

    name: str
    summary: str
    """One line for help texts."""
    sockets: tuple[HostSocket, ...] = ()
    data_folders: tuple[PurePosixPath, ...] = ()
    """Guest folders that live on the data disk and so survive `delete`."""
    commands: Mapping[str, Sequence[str]] = {}
    """Client programs to run in the guest: the word users type -> its argv prefix (e.g. nerdctl).

    The prefix works for the guest's user as well as for root, so it holds sudo where root is needed.
    """
    units: tuple[str, ...] = ()
    """systemd units in the guest whose journal `qvm logs runtime` shows."""
    start_timeout: float = 180.0
    """Seconds that `ready` may take after `start`; generous, for software emulation."""

    @abstractmethod
    async def provision(self, guest: Guest, context: RuntimeContext) -> None:
        """Install and configure; does nothing where nothing is missing."""

    @abstractmethod
    async def start(self, guest: Guest, context: RuntimeContext) -> None:
        """Start the services; returns without waiting for them to answer."""

    @abstractmethod
    async def ready(self, guest: Guest, context: RuntimeContext) -> bool:
        """Whether the runtime answers; waits in the guest rather than being asked often (up to ~5 s a call)."""

    @abstractmethod
    async def stop(self, guest: Guest, context: RuntimeContext) -> None:
        """Stop the services, containers included."""

    @abstractmethod
    async def version(self, guest: Guest, context: RuntimeContext) -> str:
        """One line, e.g. "docker 26.1.5"."""

    async def before_freeze(self, guest: Guest, context: RuntimeContext) -> None:
        """The runtime answers and is about to be frozen: have the guest track the ids that no two forks may share, and
        remove what is made anew when it is missed. Also called before a machine in use is copied, so it must
        disturb nothing.
        """
        return

    async def after_fork(self, guest: Guest, context: RuntimeContext) -> list[str]:
        """The runtime goes on in another machine: make sure it has an identity of its own. Quick: a user waits.

        Returns notes for the user, one line each.
        """
        return []

    async def teardown(self, guest: Guest, context: RuntimeContext) -> None:
        """Remove what `provision` made; the data folders stay."""
        return

    def activate(self, context: RuntimeContext, *, switch: bool) -> list[str]:
        """Publish to the host's clients (contexts); `switch` makes it the current one, remembering what was.

        Returns notes for the user, one line each (what stands in the way, such as DOCKER_HOST). What belongs to the
        user and cannot be changed safely is a note, never an exception: the instance runs all the same.
        """
        return []

    def deactivate(self, context: RuntimeContext, *, remove: bool) -> list[str]:
        """Undo the switch; `remove` (at a delete) takes the published entry away. Touches nothing of the user's.

        Idempotent, and called for instances that were never activated. Returns notes, as `activate` does.
        """
        return []

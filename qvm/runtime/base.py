"""The contract of a runtime plugin: what qvm asks of docker, containerd and whatever comes.

A plugin is a subclass of `Runtime`, found through the entry-point group `qvm.runtimes` (its entry-point name is the
word users type after `--runtime`). It imports `qvm.runtime.*`, `qvm.errors` and nothing else of qvm. Guest work goes
through `Guest`; host work (downloads, contexts, configuration files) happens in `prepare_host`, `activate` and
`deactivate`. docs/runtime-plugins.md writes one from nothing.

Order of calls at a start: `prepare_host` before there is a machine; `provision` (every start, idempotent), `start`,
then each of `checks` until it holds, then, once the host sockets and ports answer, `activate`; then `watch_ports` for
as long as the instance runs. At a stop: `deactivate`, `stop`. At a delete: `deactivate(remove=True)`.

A runtime that runs may be frozen with its machine, and go on in any number of others: `before_freeze` once it is ready,
in a machine that belongs to nobody, with a blank data disk; `after_fork` instead of `provision`, `start` and `checks`
in each fork, which has its user, its host name and everything else by then.

A runtime that names others in `runs_on` is an add-on: it comes on top of one of them, in the same machine, and is
called after it at a start and before it at a stop.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from qvm.execresult import ExecResult as ExecResult
from qvm.progress import Progress as Progress
from qvm.runtime.network import Network


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

    async def send_file(
        self, source: Path, target: PurePosixPath, *, mode: int = 0o644, timeout: float = 600.0
    ) -> None:
        """Copy a file of the host's, however large, and put it in place atomically; parents are made.

        Over the agent's byte streams: some 70 MiB/s under software emulation.
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
class HostPort:
    """A guest port that the host gets at 127.0.0.1 under a number of its own, the same at each start if it is free."""

    name: str
    guest_port: int
    wish: int = 0
    """The host's number, if the user asked for one; 0: any."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a runtime needs in the guest. `Runtime.provision` brings it there where it is missing."""

    packages: Mapping[str, str] = field(default_factory=dict)
    """Package manager (apt, apk, dnf) -> names with spaces between."""
    programs: tuple[str, ...] = ()
    """The packages are there if all of these are found in the guest's PATH."""
    kernel_modules: tuple[str, ...] = ()
    """Loaded at each boot; one that is built into the kernel counts."""


@dataclass(frozen=True, slots=True)
class ReadyCheck:
    """One thing that must answer before the runtime counts as started."""

    name: str
    """As messages have it: "dockerd's socket"."""
    check: Callable[[Guest, RuntimeContext], Awaitable[bool]]
    """Whether it holds; waits in the guest rather than being asked often (up to ~5 s a call). A QvmError where it never
    will, with its details."""
    hint: str
    """What a user can do where it does not hold in time."""
    timeout: float = 180.0
    """Seconds; generous, for software emulation."""


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
    cache_folder: Path | None = None
    """A host folder for the plugin's downloads, shared by all instances; it may not exist yet."""
    arch: str = ""
    """The guest's: x86_64 or aarch64."""
    primary: str = ""
    """For an add-on: the runtime under it."""
    sole: bool = True
    """In `after_fork`: no other machine goes on from the same state."""
    host_ports: Mapping[str, int] = field(default_factory=dict)
    """`HostPort.name` -> its number at 127.0.0.1, once it has one."""
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings of every runtime in the machine, by its name; the core's, which gives each its own as `settings`."""
    network: Network = field(default_factory=Network)
    """Proxies, registries and certificates; the latter are installed before a plugin is called."""

    def host_socket(self, name: str) -> Path:
        return self.folder / f"{name}.sock"

    def own(self, name: str, *, addon_to: str = "") -> RuntimeContext:
        """The context of one of several runtimes; add-ons keep their state in folders of their own."""
        return replace(
            self, settings=self.sections.get(name, {}), primary=addon_to,
            state_folder=self.state_folder / name if addon_to else self.state_folder,
            cache_folder=None if self.cache_folder is None else self.cache_folder / name,
        )


class Runtime(ABC):
    """One runtime. Instances carry no state: everything lives in the guest or in `state_folder`."""

    name: str
    summary: str
    """One line for help texts."""
    runs_on: tuple[str, ...] = ()
    """An add-on names the runtimes that it can be put on top of."""
    needs: Needs = Needs()
    single_use: bool = False
    """It has keys in its memory that no two machines may share: a warm image with it in it is forked once."""
    sockets: tuple[HostSocket, ...] = ()
    private_ports: tuple[int, ...] = ()
    """Guest ports that are the runtime's own business: the host does not get them though they are listened to."""
    data_folders: tuple[PurePosixPath, ...] = ()
    """Guest folders that live on the data disk and so survive `delete`."""
    commands: Mapping[str, Sequence[str]] = {}
    """Client programs to run in the guest: the word users type -> its argv prefix (e.g. nerdctl).

    The prefix works for the guest's user as well as for root, so it holds sudo where root is needed.
    """
    credential_variables: Mapping[str, str] = {}
    """Clients of `commands` that can use the host's registry logins -> the variable that tells them where:
    `NAME={folder}`, a folder with docker's config.json in it."""
    units: tuple[str, ...] = ()
    """systemd units in the guest whose journal `qvm logs runtime` shows."""
    start_timeout: float = 180.0
    """Seconds that `ready` may take after `start`; generous, for software emulation."""

    def prepare_host(self, context: RuntimeContext, progress: Progress) -> None:
        """Fetch what the guest is going to need, before there is one; `qvm.runtime.fetch` has the means.

        Quick where nothing is missing: it runs at every start. A QvmError where the start must fail for it.
        """
        return

    async def provision(self, guest: Guest, context: RuntimeContext) -> None:
        """Install and configure; does nothing where nothing is missing. By default: what `needs` says."""
        from qvm.runtime.services import ensure_needs

        await ensure_needs(guest, self.needs, what=self.name)

    @abstractmethod
    async def start(self, guest: Guest, context: RuntimeContext) -> None:
        """Start the services; returns without waiting for them to answer."""

    async def ready(self, guest: Guest, context: RuntimeContext) -> bool:
        """Whether the runtime answers: a runtime of one check may have it here. Waits as `ReadyCheck.check` does."""
        return True

    def checks(self, context: RuntimeContext) -> Sequence[ReadyCheck]:
        """What must hold, in this order, before the instance counts as started."""
        return (ReadyCheck(self.name, self.ready, "`qvm logs runtime` shows its journal", self.start_timeout),)

    @abstractmethod
    async def stop(self, guest: Guest, context: RuntimeContext) -> None:
        """Stop the services, containers included."""

    @abstractmethod
    async def version(self, guest: Guest, context: RuntimeContext) -> str:
        """One line, e.g. "docker 26.1.5"."""

    async def update(self, guest: Guest, context: RuntimeContext) -> list[str]:
        """Bring the runtime in the guest up to date; returns what changed, one line each ("docker.io: 26.1 -> 27.0").

        By default the packages of `needs`. Services are started anew where that is called for.
        """
        from qvm.runtime.services import upgrade_packages

        return await upgrade_packages(guest, self.needs.packages, what=self.name) if self.needs.packages else []

    def host_ports(self, context: RuntimeContext) -> Sequence[HostPort]:
        """Guest ports that the host gets under numbers of their own."""
        return ()

    async def watch_ports(
        self, guest: Guest, context: RuntimeContext, publish: Callable[[Sequence[tuple[str, int]]], None]
    ) -> None:
        """Tell which ports of the guest answer though nobody listens there (packet filters forward them).

        Runs while the instance does. Each call of `publish` gives all of them, as (an address to dial in the guest,
        port); the host gets them at 127.0.0.1 like those that are listened to. Called anew where it raises a QvmError
        or an OSError.
        """
        return

    def warm_settings(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """What of the settings a runtime that runs already depends on: profiles that share it share warm images."""
        return settings

    def warm_identity(self, sections: Mapping[str, Mapping[str, Any]]) -> list[Any]:
        """What a frozen machine with this runtime in it depends on, as JSON: the name, the plugin's code, settings."""
        settings = self.warm_settings(sections.get(self.name, {}))
        return [self.name, source_digest(type(self)), sorted(settings.items())]

    def primary_settings(self, primary: str) -> Mapping[str, Any]:
        """For an add-on: settings that the runtime under it must have; the user's own are laid over them."""
        return {}

    async def reset(self, guest: Guest, context: RuntimeContext) -> None:
        """For an add-on: back to how it is when it is new, and stopped."""
        await self.stop(guest, context)

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

    def environment(self, context: RuntimeContext) -> Mapping[str, str]:
        """Variables for programs of the host that know nothing of contexts; `qvm status` shows them."""
        return {}

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


def source_digest(plugin: type[Runtime]) -> str:
    """Of the plugin's own files: another version of it provisions another way."""
    digest = hashlib.sha256()
    folder = Path(inspect.getfile(plugin)).parent
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()

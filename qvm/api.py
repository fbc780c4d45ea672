"""The embedding API behind `import qvm`: one class and the functions that give one. Raises the CLI's errors, prints
nothing, and may be used from several threads and processes at once (instances are locked, not globals)."""

from __future__ import annotations

import secrets
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from qvm.errors import DeadlineError, GuestCommandError, InstanceStateError, UsageError
from qvm.filenames import Files
from qvm.progress import NullProgress, Progress
from qvm.supervisor.client import NoSupervisorError, call

MAX_INPUT = 8 << 20
Output = Callable[[bytes], None]


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a command in the guest came to; `exit_code` is 128 + n where signal n ended it."""

    exit_code: int
    stdout: str
    """Empty where a callback took it; bytes that are no UTF-8 are replaced."""
    stderr: str
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds by step of a throw-away machine: plan, spawn, restore, agent, personalise, command, cleanup."""


class VM:
    """A handle on one instance. As a context manager it stops the instance at the end of the block."""

    def __init__(self, profile: str) -> None:
        self.profile = profile

    def __repr__(self) -> str:
        return f"VM({self.profile!r})"

    @property
    def address(self) -> str | None:
        """Of the network that VMs share (`network_address=True`), in which others reach it; None without one."""
        from qvm.commands.status import status

        found = status(self.profile).get("network", {}).get("address")
        return None if found is None else str(found)

    def run(
        self,
        argv: Sequence[str],
        *,
        cwd: str | PurePosixPath | None = None,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        input: bytes | str | None = None,
        timeout: float | None = 60.0,
        on_stdout: Output | None = None,
        on_stderr: Output | None = None,
        check: bool = False,
    ) -> RunResult:
        """Run `argv` in the guest as root, or as `user`, through the agent (no network, no SSH).

        `cwd` is a folder of the guest. A callback gets an output piece by piece (bytes, in this thread); what has none
        is collected. `input` has at most 8 MiB. Raises DeadlineError after `timeout` seconds, GuestCommandError on a
        non-zero exit where `check`, InstanceStateError where the instance does not run.
        """
        data = _to_bytes(input) or b""
        if len(data) > MAX_INPUT:
            raise UsageError(f"{len(data)} bytes of input are too many here", hint="copy them in as a file first")
        sink = _Sink(on_stdout, on_stderr)
        try:
            answer = call(
                Files(self.profile).control_socket, "exec", argv=list(argv), exec_timeout=timeout,
                timeout=None if timeout is None else timeout + 10.0, cwd=None if cwd is None else str(cwd),
                env=dict(env or {}), user=user, input=b64encode(data).decode(), stream=True, on_event=sink.take,
            )
        except NoSupervisorError as error:
            raise InstanceStateError(f"{self.profile!r} is not running",
                                     hint=f"`qvm start {self.profile}` starts it") from error
        if answer["timed_out"]:
            raise DeadlineError(f"{argv[0]} did not end within {timeout:g} s", details=sink.last_words())
        return _finish(argv, RunResult(int(answer["exit_code"]), sink.text("out"), sink.text("err")), check=check)

    def status(self) -> dict[str, Any]:
        """What `qvm status --json` shows: sizes in bytes, times in seconds."""
        from qvm.commands.status import status

        return status(self.profile)

    def stop(self, *, force: bool = False) -> None:
        from qvm.commands.stop import stop

        stop(self.profile, force=force, progress=NullProgress())

    def suspend(self) -> None:
        """Save the VM with all that runs in it, and end it; `qvm.start(profile)` goes on there.

        InstanceStateError, and it runs on, where something in the guest holds a host folder.
        """
        from qvm.commands.suspend import suspend

        suspend(self.profile, progress=NullProgress())

    def resume(self) -> None:
        """Go on where `suspend` left off; InstanceStateError where nothing is suspended."""
        from qvm.commands.suspend import resume

        resume(self.profile, progress=NullProgress())

    def snapshot(self, name: str | None = None) -> str:
        """Remember this moment, disks and memory, while the VM runs on; returns the snapshot's name."""
        from qvm.commands.snapshot import create

        chosen = name or f"snapshot-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        create(self.profile, chosen, progress=NullProgress())
        return chosen

    def restore(self, name: str) -> None:
        """Be again what the snapshot remembers; what is now is lost unless a snapshot has it."""
        from qvm.commands.snapshot import restore

        restore(self.profile, name, progress=NullProgress())

    def snapshots(self) -> list[dict[str, Any]]:
        """Oldest first: name, created (seconds since the epoch), running, size (bytes) ..."""
        from qvm.commands.snapshot import list_all

        return list_all(self.profile)

    def delete_snapshot(self, name: str) -> None:
        from qvm.commands.snapshot import delete

        delete(self.profile, name, progress=NullProgress())

    def fork(self, profile: str) -> VM:
        """A copy of this VM under another name, running, with an identity of its own; this one goes on undisturbed.

        What runs in this VM runs in both from then on. One that is off is copied as it is on disk, and started.
        """
        from qvm.commands.clone import clone

        clone(self.profile, profile, progress=NullProgress())
        return start(profile)

    def forward(self, host: int | str, guest: int | str, *, protocol: str = "tcp", save: bool = False) -> None:
        """Have `guest` ([ADDRESS:]PORT or a socket's path in the VM) appear at `host` (likewise), once it listens.

        A host port without an address is bound at loopback only. `save` keeps it in the profile file, else it holds
        until the next start. ConfigError where the two make no rule.
        """
        from qvm.commands.ports import add_rules

        add_rules(self.profile, [_rule(host, guest, protocol)], save=save, cwd=Path.cwd())

    def unforward(self, host: int | str, guest: int | str, *, protocol: str = "tcp", save: bool = False) -> None:
        """Take back what `forward` did; UsageError where there is no such rule."""
        from qvm.commands.ports import remove_rules

        remove_rules(self.profile, [_rule(host, guest, protocol)], save=save, cwd=Path.cwd())

    def ports(self) -> list[dict[str, Any]]:
        """What is forwarded: host, guest, protocol, state (forwarding, waiting, taken ...), reason, rule ..."""
        from qvm.commands.ports import ports

        return ports(self.profile).forwards

    def mount(
        self, source: str | Path, target: str | PurePosixPath | None = None, *, writable: bool = True,
        save: bool = False,
    ) -> None:
        """Mount a folder of the host at `target` (None: the same path) now; `save` keeps it for the next start.

        ConfigError where it cannot be mounted there, GuestError where the VM refuses.
        """
        from qvm.commands.mounts import add_mounts

        wish: dict[str, Any] = {"source": str(source), "writable": writable}
        add_mounts(self.profile, [wish if target is None else {**wish, "target": str(target)}], save=save,
                   cwd=Path.cwd())

    def unmount(self, path: str | PurePosixPath, *, force: bool = False, save: bool = False) -> None:
        """Take away what is mounted at `path`, or whose folder on the host that is; UsageError where nothing is.

        InstanceStateError, naming who, where something in the VM uses it, unless `force`.
        """
        from qvm.commands.mounts import remove_mounts

        remove_mounts(self.profile, [str(path)], save=save, force=force, cwd=Path.cwd())

    def mounts(self) -> list[dict[str, Any]]:
        """What is mounted: source, target, writable, type, state (mounted, broken), reason."""
        from qvm.commands.mounts import mounts

        return mounts(self.profile).mounts

    def delete(self, *, data: bool = False) -> None:
        from qvm.commands.delete import delete

        delete(self.profile, data=data, force=True, progress=NullProgress())

    def __enter__(self) -> VM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(force=error is not None)


def _rule(host: int | str, guest: int | str, protocol: str) -> str:
    return f"{host}:{guest}{'' if protocol == 'tcp' else f'/{protocol}'}"


class _Sink:
    """Where streamed output goes: to a callback, else into memory."""

    def __init__(self, on_stdout: Output | None, on_stderr: Output | None) -> None:
        self._callbacks = {"out": on_stdout, "err": on_stderr}
        self._collected: dict[str, list[bytes]] = {"out": [], "err": []}

    def take(self, event: dict[str, Any]) -> None:
        for name, callback in self._callbacks.items():
            if name in event:
                data = b64decode(event[name])
                if callback is not None:
                    callback(data)
                else:
                    self._collected[name].append(data)

    def text(self, name: str) -> str:
        return b"".join(self._collected[name]).decode(errors="replace")

    def last_words(self) -> str | None:
        return (self.text("err") or self.text("out")).strip()[-2000:] or None


def _to_bytes(data: bytes | str | None) -> bytes | None:
    return data.encode() if isinstance(data, str) else data


def _finish(argv: Sequence[str], result: RunResult, *, check: bool) -> RunResult:
    if check and result.exit_code != 0:
        raise GuestCommandError(f"{' '.join(argv)[:200]} failed in the guest with exit code {result.exit_code}",
                                details=(result.stderr or result.stdout).strip()[-2000:] or None)
    return result


def run(
    argv: Sequence[str],
    *,
    image: str | None = None,
    arch: str | None = None,
    runtime: str = "none",
    mounts: Sequence[str | Mapping[str, Any]] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    cpus: int | None = None,
    memory: str | float | None = None,
    disk: str | float | None = None,
    accel: str | None = None,
    cwd: str | PurePosixPath | None = None,
    input: bytes | str | None = None,
    on_stdout: Output | None = None,
    on_stderr: Output | None = None,
    check: bool = False,
    cold: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Run `argv` in a throw-away VM, as the guest's user of this user's name; nothing of the VM is left.

    `mounts` None mounts the working directory, writable, at its own path; an empty list mounts nothing; else as typed
    after `--mount`. `cwd` is a folder of the guest: by default the working directory where that is mounted, else the
    user's home. The first run ever builds an image and a warm image, which takes minutes; `progress` hears of it.

    A callback gets an output piece by piece (bytes, in this thread); what has none is collected. Raises DeadlineError
    when the command has not ended after `timeout` seconds, GuestCommandError on a non-zero exit where `check`. Installs
    no signal handlers, and may be called from several threads at once.
    """
    from qvm.commands.run import run_collected
    from qvm.commands.run_plan import Wish

    wanted = {"image": image, "arch": arch, "runtime": runtime, "cpus": cpus, "memory": memory, "disk": disk,
              "accel": accel, "env": dict(env) if env else None,
              "mounts": None if mounts is None else list(mounts) or "none"}
    wish = Wish({name: value for name, value in wanted.items() if value is not None}, Path.cwd(),
                None if cwd is None else str(cwd), cold)
    outcome = run_collected(wish, list(argv), timeout=timeout, input=_to_bytes(input), on_stdout=on_stdout,
                            on_stderr=on_stderr, progress=progress or NullProgress())
    result = RunResult(outcome.exit_code, outcome.stdout.decode(errors="replace"),
                       outcome.stderr.decode(errors="replace"), outcome.timings)
    return _finish(argv, result, check=check)


def start(
    profile: str = "default", *, cwd: Path | None = None, progress: Progress | None = None, **settings: Any
) -> VM:
    """Create or start an instance and wait until its runtime answers.

    `settings` are the fields of `qvm.config.model.Config`, written as on the command line
    (`memory="4GiB"`, `mounts=["./src:/src:ro"]`, `runtime="docker"`).
    """
    from qvm.commands.start import start as start_command

    start_command(profile, settings, cwd=cwd or Path.cwd(), progress=progress or NullProgress())
    return VM(profile)


def get(profile: str = "default") -> VM:
    """A handle on an instance that exists; NoSuchInstanceError otherwise."""
    from qvm.instance.store import load_record

    load_record(profile)
    return VM(profile)


def list_vms() -> list[VM]:
    """A handle on every instance on this host."""
    from qvm.instance.store import list_profiles

    return [VM(profile) for profile in list_profiles()]

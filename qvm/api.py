"""The embedding API behind `import qvm`: one class and the functions that give one. Raises the CLI's errors, prints
nothing, and may be used from several threads and processes at once (instances are locked, not globals)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from qvm.errors import InstanceStateError
from qvm.filenames import Files
from qvm.progress import NullProgress, Progress
from qvm.supervisor.client import NoSupervisorError, call


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a command in the guest came to; `exit_code` is 128 + n where signal n ended it."""

    exit_code: int
    stdout: str
    stderr: str


class VM:
    """A handle on one instance. As a context manager it stops the instance at the end of the block."""

    def __init__(self, profile: str) -> None:
        self.profile = profile

    def __repr__(self) -> str:
        return f"VM({self.profile!r})"

    def run(self, argv: Sequence[str], *, timeout: float = 60.0) -> RunResult:
        """Run `argv` in the guest as root through the agent (no network, no SSH) and return what came of it.

        Raises DeadlineError after `timeout` seconds, InstanceStateError where the instance does not run.
        """
        try:
            answer = call(Files(self.profile).control_socket, "exec", argv=list(argv), timeout=timeout + 10.0,
                          exec_timeout=timeout)
        except NoSupervisorError as error:
            raise InstanceStateError(f"{self.profile!r} is not running",
                                     hint=f"`qvm start {self.profile}` starts it") from error
        return RunResult(int(answer["exit_code"]), str(answer["stdout"]), str(answer["stderr"]))

    def status(self) -> dict[str, Any]:
        """What `qvm status --json` shows: sizes in bytes, times in seconds."""
        from qvm.commands.status import status

        return status(self.profile)

    def stop(self, *, force: bool = False) -> None:
        from qvm.commands.stop import stop

        stop(self.profile, force=force, progress=NullProgress())

    def delete(self, *, data: bool = False) -> None:
        from qvm.commands.delete import delete

        delete(self.profile, data=data, force=True, progress=NullProgress())

    def __enter__(self) -> VM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(force=error is not None)


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

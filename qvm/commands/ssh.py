"""`qvm ssh`, `qvm ssh-config` and client programs in the guest, over the system's ssh with pinned host keys."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from qvm.config.model import Mount
from qvm.errors import HostError, InstanceStateError, UsageError
from qvm.filenames import Files
from qvm.instance.record import Record
from qvm.instance.store import find_run, load_record
from qvm.process import call, find_program


def ssh(
    profile: str, argv: Sequence[str], *, cwd: Path, agent: bool = False, tty: bool | None = None
) -> int:
    """A shell, or `argv`, in the guest on our own terminal; returns its exit code.

    A single word is a line for the guest's shell, as ssh has it (`-- "a | b"`); several are one program and its
    arguments, passed unchanged. Starts in the working directory where that is mounted. `tty` None: a terminal where
    ours is one.
    """
    record = load_running(profile)
    line = argv[0] if len(argv) == 1 else shlex.join(argv)
    remote = remote_command(record, line, cwd=cwd)
    return _call_ssh(record, remote, agent=agent, tty=_on_terminal() if tty is None else tty)


def run_client(profile: str, client: str, argv: Sequence[str], *, cwd: Path) -> int:
    """Run a runtime's client program (nerdctl ...) in the guest; returns its exit code."""
    from qvm.runtime.stack import load_stack

    record = load_running(profile)
    runtime = load_stack(record.config)
    prefix = runtime.commands.get(client)
    if prefix is None:
        raise UsageError(
            f"{profile!r} runs {record.config.runtime}, which has no {client}",
            hint=f"`qvm start NAME --runtime containerd` makes one that has {client}" if client == "nerdctl" else None,
        )
    words = [*prefix, *argv]
    variable = runtime.credential_variables.get(client)
    if variable is not None:
        from qvm.commands.credentials import lend

        words = lend(argv, prefix, variable, Files(profile).control_socket, os.environ)
    remote = remote_command(record, shlex.join(words), cwd=cwd)
    return _call_ssh(record, remote, tty=_on_terminal() and _asks_terminal(argv))


def ssh_config(profile: str) -> str:
    """A block for ~/.ssh/config; `ssh qvm-<profile>` then works, with the host key pinned."""
    load_record(profile)
    return Files(profile).ssh_config.read_text()


def load_running(profile: str) -> Record:
    record = load_record(profile)
    if find_run(profile) is None:
        raise InstanceStateError(f"{profile!r} is not running", hint=f"`qvm start {profile}` starts it")
    return record


def remote_command(record: Record, line: str, *, cwd: Path) -> str | None:
    """What sshd runs: `line` in the working directory; None for a plain login shell with nowhere to change to."""
    folder = guest_folder(record.config.mounts, cwd)
    if folder is None:
        return line or None
    change = f"cd {shlex.quote(str(folder))}"
    return f"{change} && {line}" if line else f'{change} && exec "$SHELL" -l'


def guest_folder(mounts: Sequence[Mount], cwd: Path) -> PurePosixPath | None:
    """Where the host's working directory is in the guest; None where it is not mounted. The deepest mount wins."""
    covering = [mount for mount in mounts if cwd.is_relative_to(mount.source)]
    if not covering:
        return None
    mount = max(covering, key=lambda entry: len(entry.source.parts))
    return mount.target / PurePosixPath(*cwd.relative_to(mount.source).parts)


def _call_ssh(record: Record, remote: str | None, *, agent: bool = False, tty: bool) -> int:
    program = find_program("ssh")
    if program is None:
        raise HostError("the ssh client is not installed", hint="install openssh-client with your package manager")
    files = Files(record.config.profile)
    words = [str(program), "-F", str(files.ssh_config), "-o", "LogLevel=ERROR"]
    words += ["-A"] if agent else []
    words += ["-t"] if tty else ["-T"] if remote else []
    words.append(f"qvm-{record.config.profile}")
    return call([*words, *([remote] if remote else [])])


def _on_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _asks_terminal(argv: Sequence[str]) -> bool:
    """Whether the client was asked for a terminal itself (-t, -it); otherwise output stays free of CRs."""
    for word in argv:
        if word == "--":
            break
        if word == "--tty" or (word.startswith("-") and not word.startswith("--") and "t" in word[1:3]):
            return True
    return False

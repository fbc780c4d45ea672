"""The only door to other programs: run one, stream one, leave one behind, recognise it again, end it.

A pid alone names nothing (it is reused, and a reboot forgets it), so a process is remembered by `Identity`.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qvm.errors import DeadlineError, HostError, QvmError
from qvm.wait import Deadline, wait_until


class CommandError(QvmError):
    """A program on the host failed; `details` ends with its last lines."""

    code = "command"

    def __init__(self, argv: Sequence[str], returncode: int, output: str) -> None:
        tail = "\n".join(output.strip().splitlines()[-15:])
        how = f"exit code {returncode}" if returncode >= 0 else f"signal {-returncode}"
        super().__init__(f"{Path(argv[0]).name} failed with {how}", details=tail or None)
        self.argv = list(argv)
        self.returncode = returncode


@dataclass(frozen=True, slots=True)
class Completed:
    returncode: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="replace")


def _strings(argv: Sequence[str | os.PathLike[str]]) -> list[str]:
    return [os.fspath(word) for word in argv]


def _missing(argv: list[str]) -> HostError:
    return HostError(f"the program {argv[0]!r} is not installed")


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    input: bytes | None = None,
    timeout: float | None = None,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Completed:
    """Run a program to its end with its output captured.

    `env` is laid over the own environment. Raises CommandError on a non-zero exit when `check`, HostError when
    the program is missing, DeadlineError after `timeout` seconds (the program is killed).
    """
    words = _strings(argv)
    try:
        done = subprocess.run(
            words, input=input, capture_output=True, timeout=timeout, cwd=cwd, check=False,
            stdin=subprocess.DEVNULL if input is None else None,
            env=None if env is None else {**os.environ, **env},
        )
    except FileNotFoundError as error:
        raise _missing(words) from error
    except subprocess.TimeoutExpired as error:
        raise DeadlineError(f"{Path(words[0]).name} did not end within {timeout:g} s") from error
    if check and done.returncode != 0:
        raise CommandError(words, done.returncode, (done.stderr or done.stdout).decode(errors="replace"))
    return Completed(done.returncode, done.stdout, done.stderr)


def stream(
    argv: Sequence[str | os.PathLike[str]],
    on_line: Callable[[str], None],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    log: IO[bytes] | None = None,
) -> None:
    """Run a program, handing each line of its merged output to `on_line` as it comes (and to `log`).

    The program gets a session of its own and is ended with its children when the caller is interrupted.
    Raises CommandError with the last lines on failure.
    """
    words = _strings(argv)
    try:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd,
            env=None if env is None else {**os.environ, **env}, start_new_session=True,
        )
    except FileNotFoundError as error:
        raise _missing(words) from error
    tail: list[str] = []
    _streaming.add(child)
    try:
        assert child.stdout is not None
        for raw in child.stdout:
            if log is not None:
                log.write(raw)
            line = raw.decode(errors="replace").rstrip()
            tail = [*tail[-40:], line]
            on_line(line)
        child.wait()
    except BaseException:
        end_session(child)
        raise
    finally:
        _streaming.discard(child)
    if child.returncode != 0:
        raise CommandError(words, child.returncode, "\n".join(tail))


def _end_streaming() -> None:
    """A program streamed by a thread that nobody waits for any more must not outlive us."""
    for child in list(_streaming):
        end_session(child)


_streaming: set[subprocess.Popen[bytes]] = set()
atexit.register(_end_streaming)


def end_session(child: subprocess.Popen[bytes], *, grace: float = 5.0) -> None:
    """End a program started in a session of its own, and all its children: SIGTERM, then SIGKILL after `grace` s."""
    for signum, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, grace)):
        try:
            os.killpg(child.pid, signum)
        except ProcessLookupError:
            break
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def spawn_detached(
    argv: Sequence[str | os.PathLike[str]],
    *,
    log: Path | None,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    umask: int = -1,
    stdin: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a program that outlives us: own session, no terminal, both outputs appended to `log` (0600).

    `umask` is the program's file mode creation mask (-1: ours); without a `log` its output goes nowhere; with
    `stdin` its standard input is a pipe from us.
    """
    words = _strings(argv)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    fd = os.open(os.devnull if log is None else log, flags, 0o600)
    try:
        return subprocess.Popen(
            words, stdin=subprocess.PIPE if stdin else subprocess.DEVNULL, stdout=fd, stderr=fd, cwd="/",
            start_new_session=True,
            env=None if env is None else {**os.environ, **env}, pass_fds=tuple(pass_fds), umask=umask,
        )
    except FileNotFoundError as error:
        raise _missing(words) from error
    finally:
        os.close(fd)


class DyingProcess:
    """A program that ends when we do, however we end; made by `spawn_dying`."""

    def __init__(self, child: subprocess.Popen[bytes], leash: int | None) -> None:
        self.child = child
        self._leash = leash

    def has_ended(self, patience: float) -> bool:
        """Whether it ends, or has ended, by itself within `patience` seconds."""
        try:
            self.child.wait(patience)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End it at once, with whatever watches it, and collect it. Idempotent."""
        # Even where the program has ended and was collected: a group with a watcher in it keeps its number.
        if self.child.returncode is None or self._leash is not None:
            try:
                os.killpg(self.child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # nobody is left in it
            self.child.wait()
        if self._leash is not None:
            os.close(self._leash)
            self._leash = None


_NOT_ORPHANED = '[ "$PPID" = "$0" ] && exec "$@"'
"""We may have ended before the kernel was told to end it with us."""
# The subshell waits for the end of the pipe that only we hold open, then ends its parent, which by then has become the
# program; both are of one process group, so that ending the program by it ends the watcher too.
_WATCHED = 'exec 9<&0 </dev/null; (read -r _ <&9; kill -9 $$) >/dev/null 2>&1 & exec "$@" 9<&-'


def spawn_dying(
    argv: Sequence[str | os.PathLike[str]],
    *,
    log: int,
    umask: int = -1,
    watched: bool = sys.platform != "linux",
) -> DyingProcess:
    """Start a program in a session of its own that the system kills when the *thread* that called this ends.

    Both outputs go to the descriptor `log`. On Linux the kernel does it (PR_SET_PDEATHSIG, prctl(2)): by setpriv(1),
    which costs 2.5 ms and no code of ours between fork and exec; `watched` has a shell wait for our end instead.
    """
    words = _strings(argv)
    leash: int | None = None
    stdin: int = subprocess.DEVNULL
    before_exec: Callable[[], object] | None = None
    if watched:
        stdin, leash = os.pipe()
        words = ["/bin/sh", "-c", _WATCHED, "sh", *words]
    elif (setpriv := shutil.which("setpriv")) is not None:
        words = [setpriv, "--pdeathsig", "KILL", "--", "/bin/sh", "-c", _NOT_ORPHANED, str(os.getpid()), *words]
    else:
        import ctypes

        libc = ctypes.CDLL(None)

        parent = os.getpid()

        def before_exec() -> object:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            return os.getppid() == parent or os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[func-returns-value]

    try:
        child = subprocess.Popen(
            words, stdin=stdin, stdout=log, stderr=log, start_new_session=True, cwd="/", umask=umask,
            preexec_fn=before_exec,
        )
    except FileNotFoundError as error:
        if leash is not None:
            os.close(leash)
        raise _missing(words) from error
    finally:
        if watched:
            os.close(stdin)
    return DyingProcess(child, leash)


_PR_SET_PDEATHSIG = 1


@contextmanager
def converse(
    argv: Sequence[str | os.PathLike[str]],
    *,
    stderr: IO[bytes],
    stdin: bool = True,
    pass_fds: Sequence[int] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program to talk with over its pipes; it is killed, if it has not ended, when the block ends.

    Its errors go to the file `stderr`, where they can fill no pipe. Raises HostError where it cannot be run.
    """
    words = _strings(argv)
    try:
        child = subprocess.Popen(
            words, stdin=subprocess.PIPE if stdin else subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr,
            cwd="/", pass_fds=tuple(pass_fds),
        )
    except FileNotFoundError as error:
        raise _missing(words) from error
    except OSError as error:
        raise HostError(f"cannot run {words[0]!r}: {error.strerror}") from error
    with child:
        try:
            yield child
        finally:
            child.kill()


def replace(argv: Sequence[str | os.PathLike[str]]) -> None:
    """Become another program (execvp); returns only by raising HostError."""
    words = _strings(argv)
    try:
        os.execvp(words[0], words)
    except OSError as error:
        raise HostError(f"cannot run {words[0]!r}: {error.strerror}") from error


def call(argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str] | None = None) -> int:
    """Run a program on our own terminal and return its exit code (128 + n for signal n)."""
    words = _strings(argv)
    try:
        code = subprocess.call(words, env=None if env is None else {**os.environ, **env})
    except FileNotFoundError as error:
        raise _missing(words) from error
    return code if code >= 0 else 128 - code


def find_program(name: str, *extra: Path) -> Path | None:
    """The program `name` on PATH, in the system folders PATH may lack (/usr/sbin), or in `extra` folders."""
    folders = [os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin", "/opt/homebrew/bin"]
    found = shutil.which(name, path=os.pathsep.join([*map(os.fspath, extra), *folders]))
    return Path(found) if found else None


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes a process the one we started: its pid, when it started, and a word of its command line."""

    pid: int
    started: float
    """Clock ticks since the host's boot on Linux (they do not move when the wall clock does), else epoch seconds."""
    marker: str
    """A string that stands in its command line, such as the instance's UUID."""

    def to_dict(self) -> dict[str, Any]:
        return {"pid": self.pid, "started": self.started, "marker": self.marker}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Identity:
        return cls(int(data["pid"]), float(data["started"]), str(data["marker"]))


def _observe(pid: int) -> tuple[float, str] | None:
    """(start time, command line) of a live process; None where it is gone, a zombie, or not ours to see.

    On Linux read from proc(5) directly: psutil's import costs more than all of `qvm status` may.
    """
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            cmdline = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            return None
        # The second field is the program's name in brackets and may hold anything; state is field 3, start 22.
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else (float(fields[19]), cmdline)
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.create_time(), "\0".join(process.cmdline())
    except psutil.Error:
        return None


def identify(pid: int, marker: str) -> Identity:
    """The identity of a process that runs now; HostError where it has gone already."""
    seen = _observe(pid)
    if seen is None:
        raise HostError(f"process {pid} ended at once")
    return Identity(pid, seen[0], marker)


def is_alive(identity: Identity) -> bool:
    """Whether that very process still runs (a zombie does not, nor another program with its pid)."""
    seen = _observe(identity.pid)
    return seen is not None and seen[0] == identity.started and identity.marker in seen[1]


def kill(identity: Identity, signum: int = signal.SIGTERM) -> None:
    """Send a signal to that very process; nothing happens where it has gone or its pid belongs to another."""
    if is_alive(identity):
        try:
            os.kill(identity.pid, signum)
        except ProcessLookupError:
            return


def wait_gone(identity: Identity, deadline: Deadline) -> bool:
    """Whether that process has ended before the deadline."""
    try:
        return wait_until(lambda: not is_alive(identity), deadline)
    except DeadlineError:
        return False

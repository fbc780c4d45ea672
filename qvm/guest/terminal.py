"""A guest's program on this process's own standard streams, whatever they are: a terminal, pipes, files.

On a terminal it is put into raw mode, so that every key reaches the program, and restored at the end whatever happens.
Everything else is passed as it is, byte for byte, with bounded memory: who reads slowly slows down who writes.
Only for the main program of a process: it takes hold of the standard streams, and of signals where asked to.
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import os
import select
import signal
import stat
import sys
import termios
import time
import tty as tty_modes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from qvm.errors import HostError
from qvm.guest.guestprocess import GuestProcess, TtySize

READ_SIZE = 64 << 10
INTERRUPT_KEY = b"\x03"
STUCK_AFTER = 2.0
"""Seconds that a guest may leave input untaken before it counts as hanging."""
STUCK_KEYS = 3
"""^C on the terminal of a guest that hangs this often ends the wait."""
_BACKGROUND_PAUSE = 0.5


def is_terminal(stdin: int = 0, stdout: int = 1) -> bool:
    """Whether both ends are terminals, and ours to use: a job in the background must not read or change them."""
    try:
        return os.isatty(stdin) and os.isatty(stdout) and _in_foreground(stdin)
    except OSError:
        return False


def terminal_size(fd: int = 1) -> TtySize:
    """What the program's terminal is to look like: as ours does."""
    try:
        size = os.get_terminal_size(fd)
        rows, cols = size.lines or 24, size.columns or 80
    except OSError:
        rows, cols = 24, 80
    return TtySize(rows, cols, os.environ.get("TERM") or "xterm-256color")


async def attach(
    process: GuestProcess, *, tty: bool, on_stuck: Callable[[], None], fds: tuple[int, int, int] = (0, 1, 2)
) -> int:
    """Connect `process` with our standard streams (`fds`) until it ends; returns its exit code.

    `on_stuck` is called where someone at a terminal presses ^C again and again and the guest does not even take it.
    A reader of ours that goes away is a broken pipe for the program. HostError where output cannot be written.
    """
    writers = {"out": _Writer(fds[1]), "err": _Writer(fds[2])}
    reader = _Reader(fds[0])
    feeding = asyncio.ensure_future(_feed(reader, process, StuckKeys(on_stuck) if tty else None))
    try:
        async for name, data in process:
            writer = writers[name]
            if not await writer.write(data):
                process.hang_up(name)
        code = await process.wait()
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)
        for stream in (reader, *writers.values()):
            stream.close()
    for writer in writers.values():
        if writer.failure is not None:
            raise HostError(f"the command's output could not be written: {writer.failure.strerror}")
    return code


async def _feed(reader: _Reader, process: GuestProcess, keys: StuckKeys | None) -> None:
    while data := await reader.read():
        if keys is not None:
            keys.see(data, untaken=process.untaken, now=time.monotonic())
        await process.write(data)
        await asyncio.sleep(0)  # a file is always readable: let others have their turn
    process.write_eof()


class StuckKeys:
    """Notices ^C after ^C on a guest that takes no input any more; a live one gets them all and is none of our care."""

    def __init__(self, on_stuck: Callable[[], None]) -> None:
        self._on_stuck = on_stuck
        self._waiting_since: float | None = None
        self._presses = 0

    def see(self, data: bytes, *, untaken: int, now: float) -> None:
        """`data` was typed while `untaken` bytes typed before it had not reached the program; `now` in seconds."""
        if untaken == 0:
            self._waiting_since, self._presses = now, 0
            return
        if self._waiting_since is None:
            self._waiting_since = now
        if now - self._waiting_since < STUCK_AFTER:
            return
        self._presses += data.count(INTERRUPT_KEY)
        if self._presses >= STUCK_KEYS:
            self._presses = 0
            self._on_stuck()


def _in_foreground(fd: int) -> bool:
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return True  # not our controlling terminal: no job control there


def _own_description(fd: int, flags: int) -> int | None:
    """The same terminal or pipe opened once more, non-blocking; None for everything else.

    O_NONBLOCK belongs to the open file description, which we share with our shell and with whatever it started
    beside us (open(2)), so it is not ours to set.
    """
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISCHR(mode) and os.isatty(fd):
            return os.open(os.ttyname(fd), flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        if stat.S_ISFIFO(mode) and sys.platform == "linux":
            return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # a terminal of another user (sudo), a pipe that nobody else holds any more
        return None
    return None


class _Stream:
    def __init__(self, fd: int, flags: int) -> None:
        self._own = _own_description(fd, flags)
        self.fd = fd if self._own is None else self._own
        self.nonblocking = self._own is not None
        self._pollable = True

    def close(self) -> None:
        if self._own is not None:
            os.close(self._own)
            self._own = None

    async def _wait(self, add: Callable[..., Any], remove: Callable[..., Any]) -> None:
        """Until the descriptor is ready; files and devices without readiness always are."""
        if not self._pollable:
            return
        ready = asyncio.Event()
        try:
            add(self.fd, ready.set)
        except (PermissionError, ValueError, OSError):  # EPERM: epoll_ctl(2) on a regular file
            self._pollable = False
            return
        try:
            await ready.wait()
        finally:
            remove(self.fd)


class _Reader(_Stream):
    def __init__(self, fd: int) -> None:
        super().__init__(fd, os.O_RDONLY)

    async def read(self) -> bytes:
        """What has come; b"" at the end, which a closed or lost stream is too."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wait(loop.add_reader, loop.remove_reader)
            try:
                if os.isatty(self.fd) and not _in_foreground(self.fd):
                    await asyncio.sleep(_BACKGROUND_PAUSE)  # reading now would stop us with SIGTTIN
                    continue
                return os.read(self.fd, READ_SIZE)
            except BlockingIOError:
                continue
            except OSError:
                return b""


class _Writer(_Stream):
    def __init__(self, fd: int) -> None:
        super().__init__(fd, os.O_WRONLY)
        self.failure: OSError | None = None
        """Why nothing more can be written, beyond a reader that went away."""
        self._broken = False

    async def write(self, data: bytes) -> bool:
        """All of `data`; False once, when it is found out that nobody takes it any more."""
        if self._broken:
            return True
        loop = asyncio.get_running_loop()
        view = memoryview(data)
        while view:
            try:
                if self.nonblocking:
                    view = view[os.write(self.fd, view) :]
                    continue
                await self._wait(loop.add_writer, loop.remove_writer)
                # A pipe that polls as writable takes this much without blocking (pipe(7)).
                view = view[os.write(self.fd, view[: select.PIPE_BUF] if self._pollable else view) :]
            except BlockingIOError:
                await self._wait(loop.add_writer, loop.remove_writer)
            except OSError as error:
                self._broken = True
                if error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):
                    self.failure = error
                return False
        return True


class RawTerminal:
    """Our terminal in raw mode; `leave` gives it back as it was, and so does the interpreter's end."""

    def __init__(self, fd: int = 0) -> None:
        self._fd = fd
        self._before = termios.tcgetattr(fd)
        self._raw = False

    def enter(self) -> None:
        if not self._raw:
            atexit.register(self.leave)
        self._raw = True
        tty_modes.setraw(self._fd, termios.TCSADRAIN)

    def leave(self) -> None:
        if self._raw:
            self._raw = False
            atexit.unregister(self.leave)
            try:
                termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
            except termios.error:
                return  # the terminal has gone


@contextmanager
def on_terminal(process: GuestProcess, *, tty: bool, fds: tuple[int, int, int] = (0, 1, 2)) -> Iterator[None]:
    """While the block runs: raw mode where `tty`, changes of the window's size passed on, and stopping and going on.

    Installs signal handlers, so from the main thread only. A stop (^Z without a terminal of its own in the guest, or
    SIGTSTP from elsewhere) stops the program with us.
    """
    loop = asyncio.get_running_loop()
    raw = RawTerminal(fds[0]) if tty else None

    def take() -> None:
        if raw is not None:
            raw.enter()
            process.resize(terminal_size(fds[1]))

    def stop() -> None:
        # SIGSTOP, not SIGTSTP: a session without a terminal is an orphaned process group, which ignores that.
        process.send_signal(signal.SIGSTOP)
        if raw is not None:
            raw.leave()
        # At once and not from the loop: the guest's message has been handed to the kernel, or is there when we go on.
        os.kill(os.getpid(), signal.SIGSTOP)

    def go_on() -> None:
        take()
        process.send_signal(signal.SIGCONT)

    handlers: dict[int, Callable[[], None]] = {signal.SIGTSTP: stop, signal.SIGCONT: go_on}
    if raw is not None:
        handlers[signal.SIGWINCH] = lambda: process.resize(terminal_size(fds[1]))
    before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
    try:
        for number, handler in handlers.items():
            before[number] = signal.getsignal(number)
            loop.add_signal_handler(number, handler)
        take()
        yield
    finally:
        if raw is not None:
            raw.leave()
        for number, old in before.items():
            loop.remove_signal_handler(number)
            if old is not None:
                signal.signal(number, old)

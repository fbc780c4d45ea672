"""`qvm run`: one command in a machine of its own, on our own streams or with its output collected."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from qvm.commands.run_plan import Wish, forget_plan, plan_run
from qvm.errors import DeadlineError, GuestError
from qvm.log import get_logger
from qvm.progress import Progress
from qvm.supervisor.keeper import WarmGoneError
from qvm.supervisor.throwaway import Machine, RestoreFailedError, discard_warm, launch

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Task
    from collections.abc import Coroutine

    from qvm.guest.guestprocess import GuestProcess

KILL_AFTER = 5.0
"""Seconds between SIGTERM and SIGKILL for a command whose time is up, and again until its machine is ended."""
TIMED_OUT, KILLED = 124, 137
"""As timeout(1) has it: the command ended on SIGTERM; it had to be killed."""

CANCEL_PATIENCE = 1.0
"""Seconds that tasks may take to end after an interrupt."""

log = get_logger(__name__)

T = TypeVar("T")
Use = Callable[[Machine], "Coroutine[Any, Any, T]"]


class EndedError(KeyboardInterrupt):
    """A signal other than SIGINT asked us to end. asyncio lets no other exception of ours through its callbacks."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


@dataclass(slots=True)
class Interrupts:
    """What a signal to us means: the first interrupt is the command's, the second ends the machine."""

    _asked: bool = False

    def decide(self, signum: int) -> tuple[str, int]:
        """("forward", signal) or ("end", exit code)."""
        if signum in (signal.SIGINT, signal.SIGQUIT) and not self._asked:
            self._asked = True
            return "forward", signum
        return "end", 128 + signum


class Timeout:
    """Ends a command whose time is up: SIGTERM, SIGKILL after a grace, then the machine."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.passed = False
        self.killed = False

    async def watch(self, process: GuestProcess, end_machine: Callable[[], None]) -> None:
        import asyncio

        if self.seconds is None:
            return
        await asyncio.sleep(self.seconds)
        self.passed = True
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)  # one that was stopped would not notice
        await asyncio.sleep(KILL_AFTER)
        self.killed = True
        process.send_signal(signal.SIGKILL)
        await asyncio.sleep(KILL_AFTER)
        end_machine()

    def exit_code(self, code: int) -> int:
        return code if not self.passed else KILLED if self.killed else TIMED_OUT


@dataclass(slots=True)
class Outcome:
    exit_code: int
    stdout: bytes = b""
    stderr: bytes = b""
    timings: dict[str, float] = field(default_factory=dict)
    timed_out: bool = False


def run_on_terminal(
    wish: Wish, argv: Sequence[str], *, timeout: float | None = None, progress: Progress,
    on_timings: Callable[[Mapping[str, float]], None] | None = None,
) -> Outcome:
    """Run `argv` on this process's standard streams; the main thread's, since signals are taken over.

    Interrupts go to the command (as a key, on a terminal), a second one ends the machine; SIGTERM and SIGHUP end it
    at once. The outcome's exit code is then 128 + the signal.
    """

    async def use(machine: Machine) -> Outcome:
        return await _Attended(machine, argv, Timeout(timeout)).run()

    with _ending_on_signals():
        outcome = _with_machine(wish, use, progress=progress)
    if on_timings is not None:
        on_timings(outcome.timings)
    return outcome


def run_collected(
    wish: Wish, argv: Sequence[str], *, timeout: float | None = None, input: bytes | None = None,
    on_stdout: Callable[[bytes], None] | None = None, on_stderr: Callable[[bytes], None] | None = None,
    progress: Progress,
) -> Outcome:
    """Run `argv` and collect what it writes; an output with a callback is handed on and not collected.

    Touches no signal and no stream of this process, and may be called from any thread, several at once. Raises
    DeadlineError after `timeout` seconds of the command.
    """

    async def use(machine: Machine) -> Outcome:
        return await _collect(machine, argv, Timeout(timeout), input, {"out": on_stdout, "err": on_stderr})

    outcome = _apart(lambda: _with_machine(wish, use, progress=progress))
    if outcome.timed_out:
        details = (outcome.stderr or outcome.stdout).decode(errors="replace").strip()
        raise DeadlineError(f"{argv[0]} did not end within {timeout:g} s", details=details[-2000:] or None)
    return outcome


def _with_machine(wish: Wish, use: Use[Outcome], *, progress: Progress) -> Outcome:
    """Plan, launch, use; once more where the warm image has gone meanwhile, or, cold, where it did not come to life."""
    try:
        return _attempt(wish, use, progress=progress)
    except WarmGoneError:
        forget_plan(wish)  # it was removed since the plan was made; the next one makes another
    except RestoreFailedError as error:
        return _attempt_cold(wish, use, error, progress=progress)
    try:
        return _attempt(wish, use, progress=progress)
    except RestoreFailedError as error:
        return _attempt_cold(wish, use, error, progress=progress)


def _attempt(wish: Wish, use: Use[Outcome], *, progress: Progress) -> Outcome:
    began = time.monotonic()
    plan, env = plan_run(wish, progress=progress)
    planned = time.monotonic() - began

    async def bring_up_and_use(machine: Machine) -> Outcome:
        await machine.bring_up(env)
        return await use(machine)

    with launch(plan, env) as machine:
        outcome = _run_loop(lambda: bring_up_and_use(machine))
        ended = time.monotonic()
    outcome.timings = {"plan": planned, **machine.timings, "cleanup": time.monotonic() - ended}
    return outcome


def _attempt_cold(wish: Wish, use: Use[Outcome], error: RestoreFailedError, *, progress: Progress) -> Outcome:
    progress.note(f"{error.message}: starting cold")
    forget_plan(wish)
    discard_warm(error.warm)
    return _attempt(Wish(wish.flags, wish.cwd, wish.guest_cwd, cold=True), use, progress=progress)


class _Attended:
    """One command on our own streams, with signals and a time limit."""

    def __init__(self, machine: Machine, argv: Sequence[str], timeout: Timeout) -> None:
        import asyncio

        self.machine = machine
        self.argv = argv
        self.timeout = timeout
        self.interrupts = Interrupts()
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(self) -> Outcome:
        import asyncio

        from qvm.guest.terminal import is_terminal, on_terminal, terminal_size

        loop = asyncio.get_running_loop()
        tty = is_terminal()
        process = self.machine.start(self.argv, stdin=True, tty=terminal_size() if tty else None)
        wanted = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
        # nohup(1), and a shell that puts us in the background, have some ignored.
        handled = [signum for signum in wanted if signal.getsignal(signum) is not signal.SIG_IGN]
        with _restored(handled), on_terminal(process, tty=tty):
            for signum in handled:
                loop.add_signal_handler(signum, self._on_signal, signum, process)
            try:
                code = await self._until_end(process, tty=tty)
            finally:
                for signum in handled:
                    loop.remove_signal_handler(signum)
        self.machine.done("command")
        return Outcome(self.timeout.exit_code(code), timed_out=self.timeout.passed)

    async def _until_end(self, process: GuestProcess, *, tty: bool) -> int:
        import asyncio

        from qvm.guest.terminal import attach

        work = asyncio.ensure_future(attach(process, tty=tty, on_stuck=lambda: self._end(128 + signal.SIGINT)))
        limit = asyncio.ensure_future(self.timeout.watch(process, lambda: self._end(KILLED)))
        try:
            await asyncio.wait({work, self.ended}, return_when=asyncio.FIRST_COMPLETED)
            return self.ended.result() if self.ended.done() else await work
        except GuestError as error:
            raise self.machine.explain(error) from error
        finally:
            for task in (work, limit):
                task.cancel()
            await asyncio.gather(work, limit, return_exceptions=True)

    def _on_signal(self, signum: int, process: GuestProcess) -> None:
        what, value = self.interrupts.decide(signum)
        if what == "forward":
            process.send_signal(value)
        else:
            self._end(value)

    def _end(self, code: int) -> None:
        if not self.ended.done():
            self.ended.set_result(code)


async def _collect(
    machine: Machine, argv: Sequence[str], timeout: Timeout, input: bytes | None,
    callbacks: Mapping[str, Callable[[bytes], None] | None],
) -> Outcome:
    import asyncio

    process = machine.start(argv, stdin=False, input=input)
    collected: dict[str, list[bytes]] = {"out": [], "err": []}
    lost = asyncio.Event()

    async def read() -> int:
        async for name, data in process:
            callback = callbacks[name]
            if callback is not None:
                callback(data)
            else:
                collected[name].append(data)
        return await process.wait()

    reading, losing = asyncio.ensure_future(read()), asyncio.ensure_future(lost.wait())
    limit = asyncio.ensure_future(timeout.watch(process, lost.set))
    try:
        await asyncio.wait({reading, losing}, return_when=asyncio.FIRST_COMPLETED)
        code = await reading if reading.done() else KILLED
    except GuestError as error:
        raise machine.explain(error) from error
    finally:
        for task in (reading, losing, limit):
            task.cancel()
        await asyncio.gather(reading, losing, limit, return_exceptions=True)
    machine.done("command")
    return Outcome(timeout.exit_code(code), b"".join(collected["out"]), b"".join(collected["err"]),
                   timed_out=timeout.passed)


def _run_loop(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """asyncio.run without its signal handler, which is not ours to install in a program that imports us."""
    import asyncio
    import inspect

    loop = asyncio.new_event_loop()
    coroutine = work()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        try:
            _cancel_all(loop)
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                coroutine.close()  # interrupted before it began
        finally:
            loop.close()


def _cancel_all(loop: AbstractEventLoop) -> None:
    """Give every task the chance to clean up. An interrupt is raised wherever the loop happens to be, so what a task
    waits for may never come: it is left after a moment, since its machine ends anyway.
    """
    import asyncio

    tasks: set[Task[Any]] = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        _, left = loop.run_until_complete(asyncio.wait(tasks, timeout=CANCEL_PATIENCE))
        if left:
            log.debug("left behind: %s", left)
            loop.set_exception_handler(lambda _loop, context: log.debug("%s", context["message"]))


def _apart(work: Callable[[], T]) -> T:
    """Call `work` here, or in a thread of its own where this one already runs an event loop (a notebook's, say)."""
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return work()
    results: list[T] = []
    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed over to the thread that waits
            errors.append(error)

    thread = threading.Thread(target=attempt, name="qvm-run")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Outside the loop's care, SIGTERM and SIGHUP unwind the stack, so that everything is cleaned up."""

    def end(signum: int, _: object) -> None:
        raise EndedError(signum)

    wanted = [signum for signum in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(signum) is not signal.SIG_IGN]
    before = {signum: signal.signal(signum, end) for signum in wanted}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _restored(signals: Sequence[int]) -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in before.items():
            if handler is not None:
                signal.signal(signum, handler)


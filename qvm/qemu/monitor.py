"""QMP, the conversation with a running machine, over qemu.qmp's QMPClient (asyncio).

Events go to the subscribers the moment they arrive and are kept nowhere else: the client's own listener, which
remembers every event there ever was, is switched off. The end of the conversation is an event like any other:
`closed` is a future, and `wait_closed` awaits it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError, Runstate

from qvm.errors import QemuError
from qvm.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qemu.qmp import Message

log = get_logger(__name__)

Event = dict[str, Any]
T = TypeVar("T")
Subscriber = Callable[[Event], None]

CONNECT_TIMEOUT = 10.0
COMMAND_TIMEOUT = 30.0
"""Seconds. QEMU answers within milliseconds unless its main loop hangs (a stalled host disk)."""
UNPLUG_TIMEOUT = 20.0
"""Seconds a guest gets to let go of a device."""
MAX_PENDING_EVENTS = 1000


class _Tap(EventListener):
    """Hands every event on at once, and keeps none."""

    def __init__(self, deliver: Subscriber) -> None:
        super().__init__()
        self._deliver = deliver

    async def put(self, event: Message) -> None:
        self._deliver(dict(event))


class Monitor:
    """An open conversation with one machine; make it with `connect`."""

    def __init__(self, client: QMPClient, path: Path) -> None:
        self.path = path
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done when the conversation has ended, whoever ended it; the result says how."""
        self._client = client
        self._subscribers: list[Subscriber] = []
        self._closing = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, path: Path, *, timeout: float = CONNECT_TIMEOUT) -> Monitor:
        """Open the monitor socket at `path`.

        Raises QemuError where nobody answers as QEMU within `timeout` seconds; a second client waits, and gets this
        too, until the first has gone.
        """
        client = QMPClient(f"monitor {path.parent.name}")
        client.events.event_filter = lambda event: False
        monitor = cls(client, path)
        client.register_listener(_Tap(monitor._deliver))
        try:
            async with asyncio.timeout(timeout):
                await client.connect(str(path))
        except TimeoutError as error:
            raise QemuError(f"QEMU does not answer on {path} within {timeout:g} s") from error
        except (QMPError, OSError, EOFError) as error:
            raise QemuError(f"cannot talk to QEMU on {path}: {error}") from error
        monitor._watcher = asyncio.create_task(monitor._watch(), name=f"watch {path}")
        return monitor

    async def _watch(self) -> None:
        """Wait for the end, from either side, and clean up: the client wants exactly one to call `disconnect`."""
        closing = asyncio.ensure_future(self._closing.wait())
        while self._client.runstate == Runstate.RUNNING and not closing.done():
            changed = asyncio.ensure_future(self._client.runstate_changed())
            await asyncio.wait({changed, closing}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
        closing.cancel()
        how = "closed"
        try:
            await self._client.disconnect()
        except EOFError:
            how = "QEMU closed the connection"
        except Exception as error:  # whatever broke the conversation is its outcome, not a crash
            how = f"the conversation broke: {error!r}"
            log.warning("%s: %s", self.path, how)
        if not self.closed.done():
            self.closed.set_result(how)

    async def wait_closed(self) -> str:
        """Wait for the conversation's end; any number of callers, each may be cancelled."""
        return await asyncio.shield(self.closed)

    async def unless_closed(
        self, work: Awaitable[T], ended: Callable[[], Exception], *, patience: float | None = None
    ) -> T:
        """Await `work`, but not past QEMU's own end, which raises what `ended` returns: a dead QEMU fails at once, not
        at a deadline.

        A QEMU that dies takes the agent's channel along, and its own end may be heard later: work that has failed is
        held back for up to `patience` seconds (None: not at all), and the end is raised where it comes meanwhile.
        """
        working = asyncio.ensure_future(work)
        end = asyncio.ensure_future(self.wait_closed())
        try:
            await asyncio.wait({working, end}, return_when=asyncio.FIRST_COMPLETED)
            failed = working.done() and not working.cancelled() and working.exception() is not None
            if failed and patience is not None:
                await asyncio.wait({end}, timeout=patience)
                if end.done():
                    raise ended()
            if not working.done():
                raise ended()
            return await working
        finally:
            for task in (working, end):
                task.cancel()
            await asyncio.gather(working, end, return_exceptions=True)

    @property
    def is_open(self) -> bool:
        return not self.closed.done() and self._client.runstate == Runstate.RUNNING

    async def close(self) -> None:
        """End the conversation; QEMU runs on. Does nothing the second time."""
        self._closing.set()
        await self.wait_closed()

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = COMMAND_TIMEOUT
    ) -> Any:
        """The command's return value. QemuError where QEMU refuses, ends, or does not answer within `timeout` s."""
        try:
            async with asyncio.timeout(timeout):
                return await self._client.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            raise QemuError(f"QEMU refused {command}: {error}") from error
        except TimeoutError as error:
            raise QemuError(f"QEMU did not answer {command} within {timeout:g} s") from error
        except (ExecInterruptedError, QMPError, OSError, EOFError) as error:
            raise QemuError(f"QEMU ended before it answered {command}") from error

    async def status(self, *, timeout: float = COMMAND_TIMEOUT) -> str:
        """QMP's RunState: running, paused, prelaunch, internal-error, shutdown ..."""
        return str((await self.execute("query-status", timeout=timeout))["status"])

    async def uuid(self) -> str:
        return str((await self.execute("query-uuid"))["UUID"])

    async def powerdown(self, *, timeout: float = COMMAND_TIMEOUT) -> None:
        """Press the power button; the guest shuts down if it wants to."""
        await self.execute("system_powerdown", timeout=timeout)

    async def quit(self, *, timeout: float = COMMAND_TIMEOUT) -> None:
        """End QEMU at once, with its disks in order; the guest notices nothing."""
        await self.execute("quit", timeout=timeout)

    async def pause(self) -> None:
        await self.execute("stop")

    async def resume(self) -> None:
        await self.execute("cont")

    async def human(self, line: str) -> str:
        """What the human monitor prints for `line`: `hostfwd_add ...` and `info usernet` exist only there."""
        return str(await self.execute("human-monitor-command", {"command-line": line}))

    async def give_file(self, path: Path, name: str, *, writable: bool = False) -> None:
        """Hand QEMU a file that exists, opened for reading (or both), which it knows as `name` (QMP's `getfd`)."""
        try:
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise QemuError(f"cannot open {path}: {error.strerror}") from error
        try:
            self._client.send_fd_scm(fd)
            await self.execute("getfd", {"fdname": name})
        finally:
            os.close(fd)

    async def blockdev_add(self, options: Mapping[str, Any]) -> None:
        """Open a disk image: QAPI's BlockdevOptions, `node-name` included."""
        await self.execute("blockdev-add", options)

    async def blockdev_del(self, node: str) -> None:
        await self.execute("blockdev-del", {"node-name": node})

    async def object_add(self, kind: str, name: str, **properties: Any) -> None:
        """Add a backend object, such as the memory of a DIMM."""
        await self.execute("object-add", {"qom-type": kind, "id": name, **properties})

    async def object_del(self, name: str) -> None:
        await self.execute("object-del", {"id": name})

    async def device_add(self, driver: str, name: str, **properties: Any) -> None:
        """Plug a device in, on a spare port for PCI ones (`bus="port0"`). Underscores in property names stay."""
        await self.execute("device_add", {"driver": driver, "id": name, **properties})

    async def device_del(self, name: str, *, timeout: float = UNPLUG_TIMEOUT) -> None:
        """Unplug a device and wait until the guest has let go of it; QemuError where it does not in `timeout` s."""
        gone = asyncio.Event()

        def see(event: Event) -> None:
            if event.get("event") == "DEVICE_DELETED" and event.get("data", {}).get("device") == name:
                gone.set()

        def end(_: asyncio.Future[str]) -> None:
            gone.set()

        with self.subscribed(see):
            await self.execute("device_del", {"id": name})
            self.closed.add_done_callback(end)
            try:
                async with asyncio.timeout(timeout):
                    await gone.wait()
            except TimeoutError as error:
                raise QemuError(f"the guest did not let go of {name} within {timeout:g} s",
                                hint="something in the guest still uses it") from error
            finally:
                self.closed.remove_done_callback(end)
        if self.closed.done():
            raise QemuError(f"QEMU ended while {name} was being unplugged")

    @contextmanager
    def subscribed(self, subscriber: Subscriber) -> Iterator[None]:
        """Call `subscriber` with every event while the block runs; it must not block."""
        self._subscribers.append(subscriber)
        try:
            yield
        finally:
            self._subscribers.remove(subscriber)

    async def events(self) -> AsyncIterator[Event]:
        """Events from now on, until the conversation ends. A reader that falls far behind loses the oldest."""
        pending: asyncio.Queue[Event | None] = asyncio.Queue()

        def see(event: Event) -> None:
            if pending.qsize() >= MAX_PENDING_EVENTS:
                pending.get_nowait()
            pending.put_nowait(event)

        def end(_: asyncio.Future[str]) -> None:
            pending.put_nowait(None)

        self.closed.add_done_callback(end)
        try:
            with self.subscribed(see):
                while (event := await pending.get()) is not None:
                    yield event
        finally:
            self.closed.remove_done_callback(end)

    def _deliver(self, event: Event) -> None:
        for subscriber in tuple(self._subscribers):
            try:
                subscriber(event)
            except Exception:  # one bad subscriber must not end the conversation for all
                log.exception("a subscriber failed on %s", event.get("event"))

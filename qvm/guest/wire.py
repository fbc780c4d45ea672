"""The wire of the agent's control channel: one connection, sessions on it, answers to requests, events.

`AgentChannel` is this plus the operations; the messages are described in `qvm.guest.protocol`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from qvm.errors import DeadlineError, GuestError
from qvm.guest.guestprocess import GuestProcess
from qvm.guest.protocol import CHUNK, MAX_MESSAGE, Hello, LineParser, encode_message
from qvm.log import get_logger

_log = get_logger(__name__)
_HELLO_AGAIN_TIMEOUT = 120.0

Event = dict[str, Any]


class AgentWire:
    """Many requests at once over QEMU's socket, and one session at a time.

    An agent that starts anew (it was updated, it crashed, the guest rebooted) is noticed at once: what was under way
    fails with GuestError, a new session begins by itself, `session_hooks` run, and `on_event` gets a `session` event.
    """

    def __init__(self, on_event: Callable[[Event], None] | None = None) -> None:
        self.on_event = on_event
        self.greeting: Hello | None = None
        self.reason: str | None = None
        """Why the connection ended."""
        self.session_hooks: list[Callable[[], Awaitable[None]]] = []
        self._closed = asyncio.Event()
        self._number = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._processes: dict[int, GuestProcess] = {}
        self._nonce = ""
        self._hello: asyncio.Future[Hello] | None = None
        self._restart: asyncio.Future[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._hello_task: asyncio.Task[None] | None = None

    async def connect(self, path: Path) -> None:
        """Connect to QEMU's socket; says nothing to the guest yet. GuestError where nobody serves it."""
        try:
            reader, self._writer = await asyncio.open_unix_connection(os.fspath(path))
        except OSError as error:
            raise GuestError(f"cannot reach the agent's socket {path}: {error.strerror or error}") from error
        self._reader_task = asyncio.create_task(self._read(reader), name="agent-channel")

    async def hello(self, timeout: float | None = 60.0) -> Hello:
        """Begin a session; waits for the guest to boot as far as the agent.

        DeadlineError after `timeout` seconds (None: as long as it takes), GuestError when QEMU goes meanwhile.
        """
        self._nonce = secrets.token_hex(16)
        self._hello = asyncio.get_running_loop().create_future()
        self._say_hello()
        try:
            async with asyncio.timeout(timeout):
                self.greeting = await self._hello
        except TimeoutError:
            raise DeadlineError(f"the guest's agent did not answer within {timeout:g} s") from None
        return self.greeting

    @property
    def is_open(self) -> bool:
        return self._writer is not None and not self._closed.is_set()

    async def wait_closed(self) -> str:
        """Waits until the connection has ended (QEMU went away, or `close`); returns why."""
        await self._closed.wait()
        return self.reason or "closed"

    async def close(self) -> None:
        """Let go of the connection; the agent keeps running. Idempotent, raises nothing."""
        self._end("closed")
        tasks = [task for task in (self._reader_task, self._hello_task) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def request(self, operation: str, *, timeout: float = 60.0, **arguments: Any) -> dict[str, Any]:
        """One message and its answer; GuestError with the agent's words where it refuses, DeadlineError."""
        return await self._ask({"id": self._next_number(), "op": operation, **arguments}, timeout)

    async def _ask(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        number, operation = message["id"], message["op"]
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._send(message)
            async with asyncio.timeout(timeout):
                result: dict[str, Any] = await answer
        except TimeoutError:
            raise DeadlineError(f"the agent did not answer {operation!r} within {timeout:g} s") from None
        finally:
            self._answers.pop(number, None)
        if "error" in result:
            raise GuestError(f"the guest's agent could not do {operation!r}: {result['error']}")
        return result

    async def _upload(self, operation: str, data: bytes, extra: Mapping[str, Any]) -> dict[str, Any]:
        """A request whose `data` may need several messages of the same number."""
        number = self._next_number()
        pieces = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)] or [b""]
        for piece in pieces[:-1]:
            self._send({"id": number, "op": operation, "data": b64encode(piece).decode(), "more": True})
            await self._drain()
        last = {"id": number, "op": operation, "data": b64encode(pieces[-1]).decode(), **extra}
        return await self._ask(last, 60.0 + len(data) / (1 << 20))

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _say_hello(self) -> None:
        # The line end first: a host before us may have left half a line behind.
        self._write(b"\n" + encode_message({"id": self._next_number(), "op": "hello", "nonce": self._nonce}))

    def _send(self, message: dict[str, Any]) -> None:
        try:
            line = encode_message(message)
        except ValueError as error:
            raise GuestError(str(error), hint=f"a command line may have about {MAX_MESSAGE >> 10} KiB") from error
        self._write(line)

    def _write(self, data: bytes) -> None:
        if self._writer is None or self._closed.is_set():
            raise GuestError(f"the agent's channel is closed ({self.reason or 'never opened'})")
        self._writer.write(data)

    async def _drain(self) -> None:
        assert self._writer is not None
        try:
            await self._writer.drain()
        except OSError as error:
            raise GuestError(f"the agent's channel broke: {error}") from error

    def _forget_process(self, number: int) -> None:
        self._processes.pop(number, None)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        parser, reason = LineParser(), "QEMU closed it"
        try:
            while data := await reader.read(CHUNK):
                for message in parser.feed(data):
                    try:
                        self._on_message(message)
                    except (KeyError, TypeError, ValueError) as error:
                        _log.warning("the agent sent a message without sense: %r (%s)", message, error)
        except OSError as error:
            reason = str(error)
        finally:
            self._end(reason)

    def _on_message(self, message: dict[str, Any]) -> None:
        if self._hello is None:
            return
        if message.get("nonce") == self._nonce:
            if not self._hello.done():
                greeting = Hello.from_message(message)
                self._on_greeting(greeting)
                self._hello.set_result(greeting)
        elif message.get("event") == "started":
            self._on_started()
        elif not self._hello.done():
            return  # of a session before ours
        elif "event" in message:
            self._on_event(message)
        elif message.get("id") in self._processes:
            self._processes[message["id"]].on_message(message)
        elif (answer := self._answers.get(message.get("id", -1))) is not None and not answer.done():
            answer.set_result(message)

    def _on_greeting(self, greeting: Hello) -> None:
        """A session begins; called before any event of it is looked at, which may stand in the very next line."""

    def _on_started(self) -> None:
        assert self._hello is not None
        if not self._hello.done():
            self._say_hello()  # the agent before this one may have read ours
        elif self._restart is not None:
            if not self._restart.done():
                self._restart.set_result(None)
        else:
            _log.warning("the guest's agent has started anew")
            self._fail_all(GuestError("the guest's agent was restarted"))
            self._hello_task = asyncio.create_task(self._hello_again(), name="agent-hello")

    async def _hello_again(self) -> None:
        try:
            await self.hello(_HELLO_AGAIN_TIMEOUT)
            await self._begin_session()
        except (GuestError, DeadlineError) as error:
            _log.error("no new session with the guest's agent: %s", error)

    async def _begin_session(self) -> None:
        """After a hello that was not the first."""
        for hook in self.session_hooks:
            await hook()
        self._on_event({"event": "session"})

    def _on_event(self, message: Event) -> None:
        if message["event"] == "garbage":
            _log.warning("the agent could not read a message: %s", message.get("message"))
        if self.on_event is not None:
            self.on_event(message)

    def _end(self, reason: str) -> None:
        if self._closed.is_set():
            return
        self.reason = reason
        self._closed.set()
        self._fail_all(GuestError(f"the agent's channel is closed ({reason})"))
        if self._writer is not None:
            self._writer.close()

    def _fail_all(self, error: GuestError) -> None:
        waiting: list[asyncio.Future[Any] | None] = [*self._answers.values(), self._hello, self._restart]
        for future in waiting:
            if future is not None and not future.done():
                future.set_exception(error)
                future.exception()  # whoever waits still gets it; that nobody waits is no mistake
        for process in list(self._processes.values()):
            process.fail(error)

"""One program that runs in the guest for the host: its output as it comes, its input, its end."""

from __future__ import annotations

import asyncio
import signal
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from qvm.errors import GuestError
from qvm.guest.protocol import CHUNK, INPUT_WINDOW


@dataclass(frozen=True, slots=True)
class TtySize:
    """A terminal in the guest: what it looks like."""

    rows: int
    cols: int
    term: str = "xterm-256color"
    """The value of TERM."""

    def to_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "cols": self.cols, "term": self.term}


class GuestProcess:
    """Iterate for `("out" | "err", bytes)` until the program has ended and everything was read, then `wait`.

    Output that is not read stops the program once `OUTPUT_WINDOW` bytes wait, and nobody else.
    """

    def __init__(
        self, number: int, send: Callable[[dict[str, Any]], None], forget: Callable[[int], None]
    ) -> None:
        self.number = number
        self.timed_out = False
        self._send = send
        self._forget = forget
        self._output: deque[tuple[str, bytes]] = deque()
        self._news = asyncio.Event()
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._input_left = INPUT_WINDOW
        self._input_news = asyncio.Event()
        self._feeder: asyncio.Task[None] | None = None

    async def __aiter__(self) -> AsyncIterator[tuple[str, bytes]]:
        while True:
            while self._output:
                name, data = self._output.popleft()
                if not self._exit.done():
                    self._send({"id": self.number, "op": "ack", "bytes": len(data)})
                yield name, data
            if self._exit.done():
                return
            self._news.clear()
            await self._news.wait()

    async def wait(self) -> int:
        """The exit code, 128 + n where signal n ended it; GuestError where the channel broke before."""
        return await asyncio.shield(self._exit)

    async def write(self, data: bytes) -> None:
        """More input; waits while the program does not take it."""
        view = memoryview(data)
        while view and not self._exit.done():
            if self._input_left <= 0:
                self._input_news.clear()
                await self._input_news.wait()
                continue
            piece = view[: min(CHUNK, self._input_left)]
            self._input_left -= len(piece)
            self._send({"id": self.number, "op": "stdin", "data": b64encode(piece).decode()})
            view = view[len(piece) :]

    def write_eof(self) -> None:
        if not self._exit.done():
            self._send({"id": self.number, "op": "stdin", "eof": True})

    def send_signal(self, number: int) -> None:
        """To the program and its children; nothing happens once it has ended."""
        if not self._exit.done():
            self._send({"id": self.number, "op": "signal", "signal": int(number)})

    def resize(self, size: TtySize) -> None:
        """Its terminal has another size now."""
        if not self._exit.done():
            self._send({"id": self.number, "op": "resize", "rows": size.rows, "cols": size.cols})

    def hang_up(self, output: str) -> None:
        """Nobody wants "out" or "err" any more; the program gets a broken pipe when it writes there next."""
        if not self._exit.done():
            self._send({"id": self.number, "op": "hang_up", "output": output})

    @property
    def ended(self) -> bool:
        return self._exit.done()

    @property
    def untaken(self) -> int:
        """Bytes of input that the program, or a guest that hangs, has not taken yet."""
        return INPUT_WINDOW - self._input_left

    def feed_in_background(self, data: bytes, *, eof: bool) -> None:
        """Write `data` while the caller reads the output."""

        async def feed() -> None:
            try:
                await self.write(data)
                if eof:
                    self.write_eof()
            except GuestError as error:
                self.fail(error)

        self._feeder = asyncio.create_task(feed(), name=f"agent-input-{self.number}")

    def close(self) -> None:
        """Kill the program where it still runs, and forget it."""
        if self._feeder is not None:
            self._feeder.cancel()
        if not self._exit.done():
            try:
                self.send_signal(signal.SIGKILL)
            except GuestError:
                pass  # the channel is gone, and the next session's hello ends the program
            self._exit.cancel()
        self._forget(self.number)

    def on_message(self, message: dict[str, Any]) -> None:
        """From the channel: output, input taken, or the end."""
        for name in ("out", "err"):
            if name in message:
                self._output.append((name, b64decode(message[name])))
        if "taken" in message:
            self._input_left += int(message["taken"])
            self._input_news.set()
        if "error" in message:
            self.fail(GuestError(f"the guest's agent could not run a command: {message['error']}"))
        elif "exit" in message and not self._exit.done():
            self.timed_out = bool(message.get("timed_out"))
            self._exit.set_result(int(message["exit"]))
            self._input_news.set()
            self._forget(self.number)
        self._news.set()

    def fail(self, error: GuestError) -> None:
        """From the channel: nothing more will come."""
        if not self._exit.done():
            self._exit.set_exception(error)
            self._exit.exception()
        self._news.set()
        self._input_news.set()

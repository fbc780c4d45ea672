"""QMP for moments: synchronous, over plain file descriptors, every step under one deadline.

The supervisor talks to QEMU through `monitor.py`. This is for the short questions around it (what can this binary
do, does that machine answer), which must neither import asyncio nor hang. Protocol: QEMU's docs/interop/qmp-spec.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Mapping
from typing import Any

from qvm.errors import QemuError
from qvm.wait import Deadline

MAX_LINE = 16 * 1024 * 1024
"""Bytes; the largest reply there is (the schema) has about 0.3 MB."""


class WireError(QemuError):
    """What answers is not QMP, ended, or did not answer in time; `received` holds what it said instead."""

    def __init__(self, message: str, received: bytes = b"") -> None:
        said = received.decode(errors="replace").strip()
        super().__init__(message, details=said[-2000:] or None)


class CommandRefusedError(QemuError):
    """QEMU understood the command and refused; `kind` is QMP's error class."""

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"QEMU refused {command}: {description}")
        self.kind = kind
        self.description = description


class Wire:
    """One QMP conversation over two (or twice the same) descriptors, which stay the caller's."""

    def __init__(self, read_fd: int, write_fd: int, deadline: Deadline) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._deadline = deadline
        self._buffer = bytearray()

    def greet(self) -> dict[str, Any]:
        """Read the greeting and leave negotiation mode; returns the `version` object."""
        message = self._receive()
        try:
            version = message["QMP"]["version"]
            if not isinstance(version, dict):
                raise TypeError("version is no object")
        except (KeyError, TypeError) as error:
            raise WireError("QEMU's greeting is not one", json.dumps(message).encode()) from error
        self.execute("qmp_capabilities")
        return version

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """The command's return value; events that come in between are passed over."""
        request = {"execute": command, **({"arguments": dict(arguments)} if arguments else {})}
        self._send(json.dumps(request).encode() + b"\n")
        while True:
            message = self._receive()
            if "return" in message:
                return message["return"]
            if "error" in message:
                error = message["error"]
                raise CommandRefusedError(command, str(error.get("class")), str(error.get("desc")))
            if "event" not in message:
                raise WireError("QEMU's answer is not QMP", json.dumps(message).encode())

    def _send(self, data: bytes) -> None:
        while data:
            self._await(self._write_fd, select.POLLOUT)
            try:
                data = data[os.write(self._write_fd, data):]
            except BlockingIOError:
                continue
            except OSError as error:
                raise WireError("QEMU ended the conversation", bytes(self._buffer)) from error

    def _receive(self) -> dict[str, Any]:
        line = self._line()
        try:
            message = json.loads(line)
        except ValueError as error:
            raise WireError("QEMU's answer is not QMP", line) from error
        if not isinstance(message, dict):
            raise WireError("QEMU's answer is not QMP", line)
        return message

    def _line(self) -> bytes:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > MAX_LINE:
                raise WireError("QEMU's answer has no end", bytes(self._buffer[:200]))
            self._await(self._read_fd, select.POLLIN)
            try:
                chunk = os.read(self._read_fd, 65536)
            except BlockingIOError:  # poll(2) may report what is gone by the time it is read
                continue
            except OSError as error:
                raise WireError("QEMU ended the conversation", bytes(self._buffer)) from error
            if not chunk:
                raise WireError("QEMU ended the conversation", bytes(self._buffer))
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _await(self, fd: int, event: int) -> None:
        waiter = select.poll()
        waiter.register(fd, event)
        if not waiter.poll(self._deadline.left * 1000):
            raise WireError(f"QEMU did not answer within {self._deadline.seconds:g} s", bytes(self._buffer))

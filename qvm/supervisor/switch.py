"""One machine's part of the network that instances share: a switch without a process of its own.

Each supervisor takes the frames of its own QEMU and hands each to the QEMU it is for, by unix datagrams; QEMUs listen
at `NUMBER.q` in the network's folder, and the last byte of a card's address is its number. Broadcasts, and what is for
a card that nobody knows (behind a machine's bridge), go to all. So there is nothing to elect, and nothing whose end
ends the network for more than one machine.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections import deque
from pathlib import Path

from qvm.instance.netaddr import folder, mac, machine_socket, switch_socket
from qvm.log import get_logger

log = get_logger(__name__)

MAX_FRAME = 65536 + 4096
"""Bytes: QEMU's own limit (NET_BUFSIZE)."""
MAX_WAITING = 256
"""Frames kept for a machine that does not take them; further ones are lost, as on any network."""
BATCH = 64
"""Frames until others have their turn."""
LOOK_INTERVAL = 1.0
"""Seconds for which the list of machines holds."""
_ADDRESS = bytes.fromhex(mac(0).replace(":", ""))[:5]


class Switch:
    """Lives in one event loop."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._loop = asyncio.get_running_loop()
        self._ways: dict[int, _Way] = {}
        self._machines: list[int] = []
        self._looked = -LOOK_INTERVAL
        path = switch_socket(number)
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        before = os.umask(0o177)
        try:
            self._socket.bind(str(path))
        finally:
            os.umask(before)
        self._path = path
        self._loop.add_reader(self._socket, self._take)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()
        self._path.unlink(missing_ok=True)
        for way in self._ways.values():
            way.close()
        self._ways = {}

    def _take(self) -> None:
        for _ in range(BATCH):
            try:
                frame = self._socket.recv(MAX_FRAME)
            except (BlockingIOError, InterruptedError):
                return
            if len(frame) < 14:  # an Ethernet header
                continue
            for number in self._receivers(frame):
                way = self._ways.get(number)
                if way is None:
                    way = self._ways[number] = _Way(self._loop, machine_socket(number))
                way.send(frame)

    def _receivers(self, frame: bytes) -> list[int]:
        if frame[:5] == _ADDRESS and frame[5] != self._number and machine_socket(frame[5]).exists():
            return [frame[5]]
        now = time.monotonic()
        if now - self._looked >= LOOK_INTERVAL:
            self._looked = now
            self._machines = [int(path.stem) for path in folder().glob("*.q") if path.stem.isdigit()]
        return [number for number in self._machines if number != self._number]


class _Way:
    """To one QEMU."""

    def __init__(self, loop: asyncio.AbstractEventLoop, path: Path) -> None:
        self._loop = loop
        self._path = path
        self._socket: socket.socket | None = None
        self._waiting: deque[bytes] = deque()

    def send(self, frame: bytes) -> None:
        if self._waiting:
            if len(self._waiting) < MAX_WAITING:
                self._waiting.append(frame)
            return
        if not self._hand_over(frame) and self._socket is not None:
            self._waiting.append(frame)
            self._loop.add_writer(self._socket, self._go_on)

    def _hand_over(self, frame: bytes) -> bool:
        """False where there is no room at the moment; a frame for nobody is gone."""
        for _ in range(2):  # a machine that has started anew has another socket of the same name
            try:
                if self._socket is None:
                    self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                    self._socket.setblocking(False)
                    self._socket.connect(str(self._path))
                self._socket.send(frame)
                return True
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    return True
                self.close()
        return True

    def _go_on(self) -> None:
        while self._waiting:
            connection = self._socket
            if not self._hand_over(self._waiting[0]):
                return
            if self._socket is not connection:  # it has gone, or come again; what waited was for the old one
                return
            self._waiting.popleft()
        if self._socket is not None:
            self._loop.remove_writer(self._socket)

    def close(self) -> None:
        if self._socket is not None:
            self._loop.remove_writer(self._socket)
            self._socket.close()
        self._socket = None
        self._waiting.clear()

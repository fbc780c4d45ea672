"""Forwards of QEMU's user network (slirp), by the human monitor: QMP has no commands for them."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import socket
import sys
from dataclasses import dataclass
from typing import NamedTuple

from qvm.errors import QemuError
from qvm.guest.portplan import GUEST_ADDRESS
from qvm.guest.relay import BACKLOG
from qvm.log import get_logger
from qvm.qemu.monitor import Monitor

log = get_logger(__name__)

NETDEV = "net0"
# "  TCP[HOST_FORWARD]  26       127.0.0.1 29701       10.0.2.15  9701     0     0" (`info usernet`)
_LINE = re.compile(r"^\s*(TCP|UDP)\[HOST_FORWARD\]\s+(\d+)\s+(\S+)\s+(\d+)\s+(\S+)\s+(\d+)", re.MULTILINE)
_SYS_PIDFD_GETFD = 438
"""The same number on every architecture (asm-generic/unistd.h)."""


class HostForward(NamedTuple):
    protocol: str
    fd: int
    """In QEMU."""
    address: str
    port: int
    guest_port: int


def parse_forwards(text: str) -> list[HostForward]:
    """What `info usernet` says of forwards from the host. Pure."""
    return [HostForward(kind.lower(), int(fd), "0.0.0.0" if address == "*" else address, int(port), int(guest_port))
            for kind, fd, address, port, _, guest_port in _LINE.findall(text)]


@dataclass(slots=True)
class QemuUserNetwork:
    """A `qvm.guest.dial.UserNetwork` of one QEMU process. Calls run one after another, in the order they were made."""

    monitor: Monitor
    pid: int
    ssh_port: int
    """Its forward is part of QEMU's command line and stays."""
    _turn: asyncio.Lock

    @classmethod
    def of(cls, monitor: Monitor, *, pid: int, ssh_port: int) -> QemuUserNetwork:
        return cls(monitor, pid, ssh_port, asyncio.Lock())

    async def add(self, protocol: str, address: str, port: int, guest_port: int) -> None:
        async with self._turn:
            rule = f"{protocol}:{address}:{port}-{GUEST_ADDRESS}:{guest_port}"
            said = (await self.monitor.human(f"hostfwd_add {NETDEV} {rule}")).strip()
            if said:
                raise QemuError(f"QEMU did not take the forward {rule}: {said}")
            if protocol == "tcp":
                await self._lengthen_queue(address, port)

    async def remove(self, protocol: str, address: str, port: int) -> None:
        async with self._turn:
            try:
                said = await self.monitor.human(f"hostfwd_remove {NETDEV} {protocol}:{address}:{port}")
            except QemuError as error:
                log.debug("a forward went with its QEMU: %s", error)
                return
            log.debug("%s", said.strip())

    async def clear(self) -> None:
        """Remove what a supervisor before us has left in a QEMU that lives on."""
        for old in parse_forwards(await self.monitor.human("info usernet")):
            if (old.protocol, old.port) != ("tcp", self.ssh_port):
                log.info("removing the forward of port %d that an earlier supervisor left", old.port)
                await self.monitor.human(f"hostfwd_remove {NETDEV} {old.protocol}:{old.address}:{old.port}")

    async def _lengthen_queue(self, address: str, port: int) -> None:
        """slirp listens with a queue of one, so that of many connections at once most wait for TCP to try again, some
        for a minute. listen(2) on a socket that listens already changes its queue, and we may have QEMU's socket."""
        for found in parse_forwards(await self.monitor.human("info usernet")):
            if (found.protocol, found.address, found.port) == ("tcp", address, port):
                try:
                    sock = take_socket(self.pid, found.fd)
                except OSError as error:
                    log.info("many connections to port %d at once will be slow: %s", port, error)
                    return
                with sock:
                    sock.listen(BACKLOG)
                return


def take_socket(pid: int, fd: int) -> socket.socket:
    """Another process's socket, shared (pidfd_getfd(2)). OSError where the system has no such call or forbids it."""
    if not sys.platform.startswith("linux"):
        raise OSError("this system does not share sockets between processes")
    pidfd = os.pidfd_open(pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        taken = libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0)
        if taken < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(pidfd)
    return socket.socket(fileno=taken)

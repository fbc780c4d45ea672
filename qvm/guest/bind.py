"""Listening sockets of the host: loopback unless an address is named, and what a refusal means to the user."""

from __future__ import annotations

import errno
import socket
import sys
from typing import Literal

from qvm.config.ports import LOOPBACK, Ports
from qvm.guest.relay import BACKLOG
from qvm.log import get_logger

log = get_logger(__name__)

State = Literal["opening", "forwarding", "taken", "denied", "failed", "stopped"]
_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def bind_ports(end: Ports, protocol: str = "tcp") -> list[socket.socket]:
    """Sockets at one port: at the address that is named, else at both loopback addresses. OSError."""
    if end.address is None:
        return bind_loopback(end.first, protocol)
    return [bind_one(end.address, end.first, protocol)]


def bind_loopback(port: int, protocol: str = "tcp") -> list[socket.socket]:
    """Sockets at 127.0.0.1:`port` and, where the host has it and it is free, [::1]:`port`.

    Many programs try ::1 first for "localhost"; without it they lose time but still arrive. OSError where
    127.0.0.1 cannot be had.
    """
    return [bind_one(LOOPBACK, port, protocol), *bind_companion(port, protocol)]


def bind_companion(port: int, protocol: str = "tcp") -> list[socket.socket]:
    """A socket at [::1]:`port`, or none."""
    try:
        return [bind_one("::1", port, protocol)]
    except OSError as error:
        log.debug("no listener at [::1]:%d: %s", port, error)
        return []


def bind_one(address: str, port: int, protocol: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, _KINDS[protocol])
    try:
        if protocol == "tcp" and sys.platform.startswith("linux"):
            # Rebinding past TIME_WAIT. Elsewhere it would also bind over another program's wildcard listener.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        if protocol == "tcp":
            sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def explain_refusal(error: OSError, port: int) -> tuple[State, str]:
    """What a failed bind means to the user, with what mends it."""
    if error.errno == errno.EADDRINUSE:
        return "taken", f"another process on this host listens on port {port}; it is forwarded once that one ends"
    if error.errno == errno.EADDRNOTAVAIL:
        return "failed", "this host has no such address"
    if error.errno in (errno.EACCES, errno.EPERM):
        mend = (f"`sudo sysctl net.ipv4.ip_unprivileged_port_start={port}` allows it"
                if sys.platform.startswith("linux") else "publish the container on a port of 1024 or above")
        return "denied", f"port {port} needs a privilege on this host; {mend}"
    return "failed", f"port {port} cannot be bound: {error.strerror or error}"

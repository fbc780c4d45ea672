"""How host code reaches a socket in the guest, whatever carries the bytes.

`StreamMux` (the agent's byte streams over virtio-serial) and `SshConnection` both satisfy `Dialer`; the forwarders
are written against it and never know which one they have. Datagrams and listening in the guest are the agent's alone;
QEMU's own forwards are another way altogether.
"""

from __future__ import annotations

from typing import Protocol


class Connection(Protocol):
    """One byte stream to a guest socket. Used by at most one reader and one writer at a time."""

    async def recv(self, limit: int = 256 * 1024) -> bytes:
        """The next bytes, at most `limit`; b"" once the guest's side has ended its half. GuestError on a reset."""

    async def send(self, data: bytes) -> None:
        """Send all of `data`; returns when it may be followed by more (flow control). GuestError on a reset."""

    async def send_eof(self) -> None:
        """End our half: the guest's socket sees the end of input and may still answer. Idempotent."""

    async def close(self) -> None:
        """Let go of both halves, resetting what is still under way. Idempotent, raises nothing."""


class Dialer(Protocol):
    """Opens connections in the guest; GuestError with the guest's reason where it refuses."""

    async def open_tcp(self, host: str, port: int) -> Connection:
        """A TCP connection made from within the guest, so loopback listeners can be reached."""

    async def open_unix(self, path: str) -> Connection:
        """A connection to a unix stream socket in the guest, made as root."""


class Datagrams(Protocol):
    """A UDP socket in the guest that talks to one address. Nothing is ever waited for or repeated."""

    async def recv_message(self) -> bytes:
        """The next datagram. GuestError once there will be none."""

    async def send_message(self, data: bytes) -> None:
        """Send one datagram; it is dropped where the way is full. GuestError once the way is closed."""

    async def close(self) -> None: ...


class DatagramDialer(Protocol):
    async def open_udp(self, host: str, port: int) -> Datagrams:
        """A UDP socket of the guest, connected to that address; GuestError where that fails."""


class GuestListener(Protocol):
    """A socket that listens in the guest."""

    async def accept(self) -> Connection:
        """The next connection that somebody in the guest has made. GuestError once it listens no more."""

    async def close(self) -> None: ...


class GuestBinder(Protocol):
    """Listens in the guest; GuestError with the guest's reason where it refuses."""

    async def listen_tcp(self, host: str, port: int) -> GuestListener: ...

    async def listen_unix(self, path: str) -> GuestListener:
        """The socket can be connected to by everybody in the guest. A stale one is replaced."""


class UserNetwork(Protocol):
    """QEMU's own forwards: from an IPv4 address of the host to a port at the guest's network address."""

    async def add(self, protocol: str, address: str, port: int, guest_port: int) -> None:
        """QvmError where QEMU refuses. Calls take effect in the order in which they were made."""

    async def remove(self, protocol: str, address: str, port: int) -> None:
        """Does nothing where there is no such forward, or no QEMU any more."""

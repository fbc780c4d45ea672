"""How host code reaches a socket in the guest, whatever carries the bytes.

`StreamMux` (the agent's byte streams over virtio-serial) and `SshConnection` both satisfy `Dialer`; the forwarders
are written against it and never know which one they have.
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

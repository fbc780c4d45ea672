"""One kept SSH connection to the guest: host key pinned, watched, rebuilt when it dies.

Satisfies `qvm.guest.dial.Dialer`. sshd opens the connections as the guest's user, so a unix socket of the guest is
reachable where that user may open it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qvm.errors import GuestError, NotReadyError
from qvm.log import get_logger
from qvm.wait import Deadline, backoff

if TYPE_CHECKING:
    from qvm.guest.sshstream import SshStream
    from qvm.guest.sshwire import StreamTransport

log = get_logger(__name__)
# paramiko logs tracebacks of every connection attempt that fails, which is the normal course of a boot.
logging.getLogger("qvm.paramiko").setLevel(logging.CRITICAL)

KEEPALIVE = 3.0
"""Seconds of silence after which the guest is asked whether it is there."""
DEAD_AFTER = 8.0
"""Seconds of silence, questions included, after which the connection is given up."""
WATCH_PAUSE = 0.5
OPEN_TIMEOUT = 10.0
"""Seconds to open one channel, a rebuild under way included."""
FIRST_PATIENCE = 3.0
"""Seconds for the server's greeting at the first attempt. QEMU's user network accepts before the guest's network is
up and then loses the request, so a fresh attempt is better than waiting; doubled each time for slow guests."""
MOST_PATIENCE = 20.0
AUTH_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class SshTarget:
    """Where the guest's sshd is and how it is known."""

    port: int
    user: str
    key: Path
    """The client's private key (OpenSSH format, ed25519)."""
    host_key: str
    """The server's public key as a line "ssh-ed25519 AAAA..."; nothing else is accepted."""
    host: str = "127.0.0.1"


class SshConnection:
    """Keeps a connection from `start` (or the first `wait_ready`) until `close`. Lives in one event loop."""

    def __init__(self, target: SshTarget, *, on_change: Callable[[bool], None] | None = None) -> None:
        """`on_change` is told True each time the connection stands and False each time it is lost."""
        self._target = target
        self._on_change = on_change
        self._transport: StreamTransport | None = None
        self._standing = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self._attempt: socket.socket | None = None
        self._reason = "not tried yet"

    @property
    def connected(self) -> bool:
        return self._standing.is_set()

    @property
    def reason(self) -> str:
        """Why the last attempt failed or the last connection ended."""
        return self._reason

    def start(self) -> None:
        """Begin to connect, and go on until `close`. Idempotent."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name=f"ssh to port {self._target.port}")

    async def wait_ready(self, deadline: Deadline) -> None:
        """Wait until a connection is authenticated; NotReadyError with the last reason when the deadline passes.

        Only greeting, host key and authentication count: QEMU's user network accepts connections that nobody serves.
        """
        self.start()
        try:
            async with asyncio.timeout(deadline.left):
                await self._standing.wait()
        except TimeoutError:
            raise NotReadyError(
                "ssh", f"sshd in the guest did not let us in within {deadline.seconds:g} s: {self._reason}",
                hint="`qvm logs serial` shows the guest's console",
            ) from None

    async def open_tcp(self, host: str, port: int) -> SshStream:
        """A TCP connection from within the guest (RFC 4254, section 7.2)."""
        return await self._open(f"{host} port {port}", "direct-tcpip", (host, port, "127.0.0.1", 0))

    async def open_unix(self, path: str) -> SshStream:
        """A connection to a unix socket of the guest, made as the guest's user (OpenSSH's PROTOCOL, section 2.4)."""
        return await self._open(path, "direct-streamlocal@openssh.com", (path, "", 0))

    async def _open(self, what: str, kind: str, target: tuple[str | int, ...]) -> SshStream:
        from qvm.guest.sshstream import SshStream

        deadline = Deadline(OPEN_TIMEOUT)
        self.start()
        while True:
            transport = await self._wait_for_transport(deadline)
            stream = SshStream(transport, what)
            try:
                await stream.open(kind, target, timeout=max(deadline.left, 1.0))
            except GuestError:
                if transport.is_active() or deadline.passed:
                    raise
                await asyncio.wait({transport.ended})  # it broke under us: the next one may do better
            else:
                return stream

    async def _wait_for_transport(self, deadline: Deadline) -> StreamTransport:
        try:
            async with asyncio.timeout(deadline.left):
                while True:
                    await self._standing.wait()
                    if self._transport is not None and self._transport.is_active():
                        return self._transport
                    await asyncio.sleep(0.01)  # it has just died, and the keeper will know in a moment
        except TimeoutError:
            raise GuestError(f"no SSH connection to the guest: {self._reason}") from None

    async def close(self) -> None:
        """End the connection and all its streams. Idempotent."""
        if self._keeper is not None:
            if self._attempt is not None:
                self._attempt.close()  # an attempt is in a thread, which cannot be cancelled
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None

    async def _keep(self) -> None:
        while True:
            await self._connect()
            try:
                await self._watch()
            finally:
                self._standing.clear()
                transport, self._transport = self._transport, None
                if transport is not None:
                    # Joins the transport's thread, which takes up to 0.1 s.
                    await asyncio.shield(asyncio.to_thread(transport.abort))
            self._tell(standing=False)

    async def _connect(self) -> None:
        """Try until it works."""
        patience = FIRST_PATIENCE
        for pause in backoff(first=0.05, most=1.0):
            try:
                transport = await self._try_once(patience)
            except GuestError as error:
                self._reason = error.message
                log.debug("no SSH connection yet: %s", error)
                patience = min(patience * 2, MOST_PATIENCE)
                await asyncio.sleep(pause)
                continue
            self._transport = transport
            self._standing.set()
            self._tell(standing=True)
            return

    async def _try_once(self, patience: float) -> StreamTransport:
        loop = asyncio.get_running_loop()
        connecting = asyncio.ensure_future(asyncio.to_thread(self._dial_and_log_in, loop, patience))
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            outcome = (await asyncio.gather(connecting, return_exceptions=True))[0]
            if not isinstance(outcome, BaseException):
                await asyncio.to_thread(outcome.abort)
            raise

    def _dial_and_log_in(self, loop: asyncio.AbstractEventLoop, patience: float) -> StreamTransport:
        """In a thread. GuestError with a reason that can be shown."""
        import paramiko

        from qvm.guest.sshwire import StreamTransport

        target = self._target
        try:
            self._attempt = sock = socket.create_connection((target.host, target.port), timeout=patience)
        except OSError as error:
            raise GuestError(f"nothing listens on port {target.port}: {error.strerror or error}") from error
        transport = None
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            transport = StreamTransport(sock, loop)
            transport.banner_timeout = patience
            transport.handshake_timeout = transport.auth_timeout = AUTH_TIMEOUT
            transport.start_client(timeout=patience + AUTH_TIMEOUT)
            self._require_host_key(transport)
            transport.auth_publickey(target.user, paramiko.Ed25519Key.from_private_key_file(str(target.key)))
            return transport
        except (paramiko.SSHException, OSError, EOFError, GuestError) as error:
            if transport is None:
                sock.close()
            else:
                transport.abort()
            if isinstance(error, GuestError):
                raise
            raise GuestError(_reason_of(error)) from error
        finally:
            self._attempt = None

    def _require_host_key(self, transport: StreamTransport) -> None:
        """The key must be the pinned one, compared as bytes; never asked for, never added."""
        import base64

        kind, encoded, *_ = self._target.host_key.split()
        found = transport.get_remote_server_key()
        if found.get_name() != kind or found.asbytes() != base64.b64decode(encoded):
            raise GuestError(f"the SSH server on port {self._target.port} has another host key than this guest's")

    async def _watch(self) -> None:
        """Until the connection ends, by itself or by silence."""
        from qvm.guest.sshwire import forget_outcome

        transport = self._transport
        assert transport is not None
        asked = 0.0
        while not transport.ended.done():
            await asyncio.wait({transport.ended}, timeout=WATCH_PAUSE)
            silence = transport.silence
            if silence > DEAD_AFTER:
                self._reason = f"the guest has not answered for {silence:.0f} s"
                return
            if silence < KEEPALIVE:
                asked = 0.0
            elif asked == 0.0 or silence - asked > KEEPALIVE:
                asked = silence
                transport.submit(transport.send_keepalive).add_done_callback(forget_outcome)
        self._reason = "the SSH connection ended"

    def _tell(self, *, standing: bool) -> None:
        log.info("SSH connection %s", "stands" if standing else f"lost: {self._reason}")
        if self._on_change is not None:
            self._on_change(standing)


def _reason_of(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, EOFError) or "banner" in text:
        return "the connection is accepted but no SSH server answers yet"
    return f"SSH failed: {text}"

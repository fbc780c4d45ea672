"""Guest unix sockets on the host: ~/.qvm/<profile>/docker.sock answers as /run/docker.sock does in the guest."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
from pathlib import Path

from qvm.errors import HostError
from qvm.filenames import check_socket_path
from qvm.guest.dial import Connection, Dialer
from qvm.guest.relay import BACKLOG, Listener, Relays
from qvm.log import get_logger

log = get_logger(__name__)


class SocketForwarder:
    """One host unix socket (0600) whose connections go to one unix socket in the guest."""

    def __init__(self, host_path: Path, guest_path: str, dialer: Dialer) -> None:
        self.host_path = host_path
        self.guest_path = guest_path
        self._dialer = dialer
        self._relays = Relays()
        self._listener: Listener | None = None
        self._inode: tuple[int, int] | None = None

    async def start(self) -> None:
        """Listen. A stale socket file is replaced; PathTooLongError, or HostError where the path cannot be bound.

        The guest's socket is dialled for each connection, so it need not exist yet and may come and go.
        """
        listener = bind_unix(self.host_path)
        self._inode = _inode_of(self.host_path)
        self._listener = self._relays.serve(listener, self._dial, name=str(self.host_path))

    async def _dial(self) -> Connection:
        return await self._dialer.open_unix(self.guest_path)

    async def close(self) -> None:
        """Stop listening, break what is under way, remove the socket file if it is still ours. Idempotent."""
        if self._inode is not None and _inode_of(self.host_path) == self._inode:
            self.host_path.unlink(missing_ok=True)
        self._inode = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        await self._relays.close()


def bind_unix(path: Path) -> socket.socket:
    """A listening unix socket at `path`, mode 0600, which takes its place in one step.

    It is bound under a short-lived name of the same length, restricted, and renamed: nobody can connect before the
    mode is set, and there is no moment without a socket when a stale one is replaced.
    """
    check_socket_path(path)
    temporary = path.with_name("." + secrets.token_hex(32)[: max(len(path.name) - 1, 3)])
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _require_replaceable(path)
        listener.bind(os.fspath(temporary))
        try:
            temporary.chmod(0o600)
            listener.listen(BACKLOG)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        listener.close()
        raise HostError(f"cannot make the socket {path}: {error.strerror}",
                        hint="check that you may write to this folder, or set QVM_HOME to another") from error
    except HostError:
        listener.close()
        raise
    return listener


def _require_replaceable(path: Path) -> None:
    """Whatever is at `path` must be a socket that nobody answers on."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise HostError(f"{path} is in the way: it is not a socket", hint=f"move it away: mv '{path}' '{path}.old'")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        if probe.connect_ex(os.fspath(path)) in (errno.ECONNREFUSED, errno.ENOENT):
            return
    raise HostError(f"another process answers on {path}", hint="stop that process, or set QVM_HOME to another folder")


def _inode_of(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_dev, found.st_ino

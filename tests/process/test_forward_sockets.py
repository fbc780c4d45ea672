"""SocketForwarder: host unix sockets that lead to a guest's, over a real sshd."""

from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_sshd import Sshd, running_sshd

from qvm.errors import HostError, PathTooLongError
from qvm.guest.sockets import SocketForwarder, bind_unix
from qvm.guest.ssh import SshConnection
from qvm.wait import Deadline


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server that answers once it has seen the end of input, as one that reads a request to its end does."""
    writer.write(b"%d" % len(await reader.read(-1)))
    writer.close()


async def ask(path: Path, data: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(data)
    writer.write_eof()
    answer = await reader.read(-1)
    writer.close()
    return answer


def test_a_guest_socket_answers_on_the_host(sshd: Sshd, tmp_path: Path) -> None:
    async def main() -> None:
        host, guest = tmp_path / "docker.sock", tmp_path / "guest.sock"
        ssh = SshConnection(sshd.target)
        await ssh.wait_ready(Deadline(20))
        forwarder = SocketForwarder(host, str(guest), ssh)
        await forwarder.start()
        assert stat.S_IMODE(host.stat().st_mode) == 0o600
        with pytest.raises(ConnectionResetError):  # no server in the guest yet
            await ask(host, b"x")
        async with await asyncio.start_unix_server(count, guest):
            answers = await asyncio.gather(*(ask(host, b"x" * number * 1000) for number in range(60)))
            assert answers == [b"%d" % (number * 1000) for number in range(60)]
        await forwarder.close()
        await forwarder.close()
        assert not host.exists()
        await ssh.close()

    asyncio.run(main())


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    bind_unix(path).close()
    assert path.exists(), "a process that was killed leaves its socket"
    with bind_unix(path), pytest.raises(HostError, match="another process answers"):
        bind_unix(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["docker.sock"]


def test_what_is_no_socket_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    path.write_text("precious")
    with pytest.raises(HostError, match="not a socket"):
        bind_unix(path)
    assert path.read_text() == "precious"


def test_a_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PathTooLongError):
        bind_unix(tmp_path / ("x" * 100) / "docker.sock")


def test_the_longest_path_that_the_system_allows_can_be_bound(tmp_path: Path) -> None:
    folder = tmp_path / ("f" * (103 - len(str(tmp_path)) - len("/docker.sock") - 1))
    folder.mkdir()
    path = folder / "docker.sock"
    assert len(str(path)) == 103
    with bind_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_folder_that_is_missing_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot make the socket"):
        bind_unix(tmp_path / "missing" / "docker.sock")


def test_closing_leaves_a_successors_socket(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "docker.sock"
        ssh = SshConnection.__new__(SshConnection)  # never dialled here
        first = SocketForwarder(path, "/guest.sock", ssh)
        await first.start()
        path.unlink()
        second = SocketForwarder(path, "/guest.sock", ssh)
        await second.start()
        await first.close()
        assert path.exists()
        await second.close()
        assert not path.exists()

    asyncio.run(main())

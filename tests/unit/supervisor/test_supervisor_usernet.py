"""What QEMU's human monitor says of its forwards, and a socket taken from another process."""

from __future__ import annotations

import os
import socket
import sys

import pytest

from qvm.supervisor.usernet import HostForward, parse_forwards, take_socket

# QEMU 7.2 and 10.0, word for word.
SAID = (
    "Hub -1 (net0):\r\n"
    "  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n"
    "  TCP[ESTABLISHED]   31       127.0.0.1 55394       10.0.2.15    22     0     0\r\n"
    "  TCP[HOST_FORWARD]  26       127.0.0.1 29701       10.0.2.15  9701     0     0\r\n"
    "  TCP[HOST_FORWARD]  17               *   553       10.0.2.15    22     0     0\r\n"
    "  UDP[HOST_FORWARD]  113      127.0.0.1  9801       10.0.2.15  9801     0     0\r\n"
    "  UDP[236 sec]       28       10.0.2.15 40000         1.1.1.1    53     0     0\r\n"
)


def test_forwards_are_found_among_connections() -> None:
    assert parse_forwards(SAID) == [
        HostForward("tcp", 26, "127.0.0.1", 29701, 9701),
        HostForward("tcp", 17, "0.0.0.0", 553, 22),
        HostForward("udp", 113, "127.0.0.1", 9801, 9801),
    ]
    assert parse_forwards("") == []


@pytest.mark.skipif(sys.platform != "linux", reason="pidfd_getfd(2) is Linux's")
def test_a_listening_sockets_queue_can_be_changed_from_elsewhere() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1) as server:
        with take_socket(os.getpid(), server.fileno()) as taken:
            assert taken.getsockname() == server.getsockname()
            taken.listen(300)
        clients = [socket.create_connection(server.getsockname(), timeout=5) for _ in range(50)]
        for client in clients:
            client.close()


def test_what_is_no_file_of_that_process_is_an_os_error() -> None:
    with pytest.raises(OSError):
        take_socket(os.getpid(), 99999)

"""What tests of forwards share: services of "the guest" (this host's loopback) behind qvm's real agent, and clients."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from process_sshd import free_port
from test_agent_streams import streams

from qvm.guest.forward import PortForwarder
from qvm.guest.streams import StreamMux

PIECE = bytes(range(256)) * 1024


def amount(name: str, default: int) -> int:
    """How much a test does; the full counts of the specification are set in the environment."""
    return int(os.environ.get(name, default))


@asynccontextmanager
async def forwarded(folder: Path, service: Callable[[socket.socket], None], **options: Any) -> AsyncIterator[int]:
    """The host's port of a forward, through the agent, to a service that has each connection in a thread."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as server:
        guest, host = server.getsockname()[1], free_port()
        threading.Thread(target=accept_all, args=(server, service), daemon=True).start()
        async with streams(folder) as (_, _, mux):
            forwarder = forwarder_of(mux, f"{host}:{guest}", **options)
            try:
                forwarder.set_listeners([("127.0.0.1", guest)])
                yield host
            finally:
                await forwarder.close()


def forwarder_of(mux: StreamMux, *rules: str, **options: Any) -> PortForwarder:
    from qvm.config.ports import parse_rule

    return PortForwarder(mux, rules=[parse_rule(rule) for rule in rules], datagrams=mux, automatic=False, **options)


def accept_all(server: socket.socket, service: Callable[[socket.socket], None]) -> None:
    while True:
        try:
            peer, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=serve_one, args=(peer, service), daemon=True).start()


def serve_one(peer: socket.socket, service: Callable[[socket.socket], None]) -> None:
    with peer:
        try:
            service(peer)
        except OSError:
            return  # the client has gone, which some tests mean it to


def say_bye(peer: socket.socket) -> None:
    """A server that closes first."""
    peer.sendall(b"bye")


def count_and_answer(peer: socket.socket) -> None:
    """Reads to the end of input, and answers with a digest of it: needs half-close."""
    digest = hashlib.sha256()
    while data := peer.recv(1 << 20):
        digest.update(data)
    peer.sendall(digest.digest())


def send_what_is_asked(peer: socket.socket) -> None:
    """Sends as many pieces as the first line says, then their digest."""
    count = int(peer.makefile("rb").readline())
    digest = hashlib.sha256()
    for _ in range(count):
        peer.sendall(PIECE)
        digest.update(PIECE)
    peer.sendall(digest.digest())


async def ask_for_end(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        return await reader.read()
    finally:
        writer.close()

"""What stands in for QEMU's virtio-serial ports. Standard library only: the stub QEMU uses it too."""

from __future__ import annotations

import socket
import threading
from pathlib import Path


class PortBridge:
    """What a virtio-serial port with a socket chardev does: serves one host client at a time at `path`, keeps the
    guest's end open across clients, holds the host's bytes until the guest reads, drops the guest's without a client.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(str(path))
        self.server.listen(1)
        self.ours, self.guest_end = socket.socketpair()
        self.client: socket.socket | None = None
        for work in (self._serve, self._drain):
            threading.Thread(target=work, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            self.client = client
            try:
                while data := client.recv(1 << 16):
                    self.ours.sendall(data)
            except OSError:
                pass
            self.client = None
            client.close()

    def _drain(self) -> None:
        while True:
            try:
                data = self.ours.recv(1 << 16)
            except OSError:
                return
            if not data:
                return
            client = self.client
            if client is not None:
                try:
                    client.sendall(data)
                except OSError:
                    continue

    def close(self) -> None:
        for sock in (self.server, self.ours, self.guest_end):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()

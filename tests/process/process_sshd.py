"""A real OpenSSH server on loopback with a configuration and keys of its own, standing in for the guest's."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from qvm.guest.keys import ensure_key
from qvm.guest.ssh import SshTarget
from qvm.process import find_program


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Sshd:
    def __init__(self, program: Path, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.user = getpass.getuser()
        self._program = program
        self._child: subprocess.Popen[bytes] | None = None
        public = ensure_key(folder / "client", comment="test")
        (folder / "authorized_keys").write_text(public + "\n")
        self.host_key = ensure_key(folder / "host", comment="host")
        (folder / "config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host'}\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {folder / 'authorized_keys'}\nStrictModes no\nPasswordAuthentication no\n"
            "AllowTcpForwarding yes\nAllowStreamLocalForwarding yes\nMaxStartups 100\n"
            "PermitRootLogin prohibit-password\n"
        )
        self.target = SshTarget(self.port, self.user, folder / "client", self.host_key)

    def start(self) -> None:
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd's privilege separation insists on it
        log = (self.folder / "log").open("ab")
        self._child = subprocess.Popen(
            [self._program, "-D", "-e", "-f", self.folder / "config"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        log.close()
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self._child.poll() is None, (self.folder / "log").read_text()
            time.sleep(0.02)
        raise AssertionError("sshd does not listen")

    def processes(self) -> list[psutil.Process]:
        """The listener first, then the sessions' processes."""
        assert self._child is not None
        listener = psutil.Process(self._child.pid)
        return [listener, *listener.children(recursive=True)]

    def signal_all(self, signum: int) -> None:
        for process in self.processes():
            try:
                process.send_signal(signum)
            except psutil.NoSuchProcess:
                continue

    def stop(self) -> None:
        if self._child is not None and self._child.poll() is None:
            self.signal_all(signal.SIGKILL)
            self._child.wait()


@contextmanager
def running_sshd(folder: Path) -> Iterator[Sshd]:
    program = find_program("sshd")
    if program is None:
        pytest.skip("needs an OpenSSH server: apt-get install openssh-server")
    folder.mkdir(mode=0o700, exist_ok=True)
    sshd = Sshd(program, folder)
    sshd.start()
    try:
        yield sshd
    finally:
        sshd.stop()

"""The guest of the stub QEMU: qvm's real agent as a process of this host, and an SSH server's greeting.

Standard library only, as the stub is.
"""

from __future__ import annotations

import ctypes
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from port_bridge import PortBridge

AGENT = Path(__file__).resolve().parents[2] / "cloud-init" / "agent.py"
PR_SET_PDEATHSIG = 1


def start_guest(agent_socket: Path, stream_socket: Path, hostfwd: str) -> None:
    """Begin to serve; everything ends with this process."""
    ports = [PortBridge(agent_socket), PortBridge(stream_socket)]
    fds = [port.guest_end.fileno() for port in ports]
    libc = ctypes.CDLL(None)
    root = agent_socket.parent / "guest"
    root.mkdir(exist_ok=True)
    subprocess.Popen(
        [sys.executable, "-I", "-S", str(AGENT), "--control", f"fd:{fds[0]}", "--streams", f"fd:{fds[1]}",
         "--root", str(root), "--seed", "none"],
        pass_fds=fds,
        # The agent shuts down the machine it runs on when it is asked to; this one must not find the means.
        env={"PATH": "/nonexistent"},
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
    )
    match = re.search(r"hostfwd=tcp:127\.0\.0\.1:(\d+)-:22", hostfwd)
    assert match is not None, hostfwd
    sshd = socket.create_server(("127.0.0.1", int(match[1])))
    threading.Thread(target=_greet, args=(sshd,), daemon=True).start()


def _greet(sshd: socket.socket) -> None:
    while True:
        client, _ = sshd.accept()
        with client:
            client.sendall(b"SSH-2.0-stub\r\n")

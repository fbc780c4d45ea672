"""The guest of the stub QEMU: qvm's real agent as a process of this host, and an SSH server's greeting.

Besides the agent itself the standard library only, as the stub is.
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

REPOSITORY = Path(__file__).resolve().parents[2]
PR_SET_PDEATHSIG = 1


def start_guest(agent_socket: Path, stream_socket: Path, hostfwd: str) -> None:
    """Begin to serve; everything ends with this process."""
    sys.path.append(str(REPOSITORY))  # the stub runs without site-packages, where an installed qvm would be
    from qvm.agentbundle import agent_source

    ports = [PortBridge(agent_socket), PortBridge(stream_socket)]
    fds = [port.guest_end.fileno() for port in ports]
    libc = ctypes.CDLL(None)
    root = agent_socket.parent / "guest"
    root.mkdir(exist_ok=True)
    agent = root / "agent.py"
    agent.write_bytes(agent_source())
    subprocess.Popen(
        [sys.executable, "-I", "-S", str(agent), "--control", f"fd:{fds[0]}", "--streams", f"fd:{fds[1]}",
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

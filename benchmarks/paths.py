"""How bytes get from guest to host: the agent's streams (what qvm uses), OpenSSH -L, paramiko, one after another.

    python benchmarks/paths.py [--rounds 3] [--megabytes 48]

Each path opens a connection to one program on the guest's loopback, which sends so many MiB; and, for latency, opens
connections that get one byte. Compare figures of one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import QVM, machine, row, run, scratch_home, summary

from qvm.guest.ssh import SshConnection, SshTarget
from qvm.wait import Deadline, wait_until

SERVER = """
import socket
listener = socket.socket(); listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("127.0.0.1", 9700)); listener.listen(64)
block = bytes(1 << 20)
while True:
    peer, _ = listener.accept()
    count = int(peer.recv(16) or b"0")
    if count == 0: peer.sendall(b"x")
    for _ in range(count): peer.sendall(block)
    peer.close()
"""


def ask(port: int, megabytes: int) -> float:
    """Seconds from connect to the end of the answer."""
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=300) as connection:
        connection.sendall(str(megabytes).encode())
        left = megabytes << 20 or 1
        while left and (data := connection.recv(1 << 20)):
            left -= len(data)
    if left:
        raise SystemExit(f"{left} bytes are missing")
    return time.perf_counter() - began


async def ask_paramiko(target: SshTarget, megabytes: int, rounds: int) -> list[float]:
    """The same over one kept paramiko connection."""
    ssh = SshConnection(target)
    await ssh.wait_ready(Deadline(60))
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        stream = await ssh.open_tcp("127.0.0.1", 9700)
        await stream.send(str(megabytes).encode())
        left = megabytes << 20 or 1
        while left and (data := await stream.recv()):
            left -= len(data)
        taken.append(time.perf_counter() - began)
        await stream.close()
    await ssh.close()
    return taken


@contextmanager
def openssh_tunnel(config: Path, env: dict[str, str]) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    words = ["ssh", "-F", str(config), "-o", "ControlMaster=no", "-o", "ControlPath=none", "-N",
             "-L", f"127.0.0.1:{port}:127.0.0.1:9700", "qvm-bench"]
    child = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(port), Deadline(60, "ssh -L"))
        yield port
    finally:
        child.terminate()
        child.wait()


def answers(port: int) -> bool:
    try:
        ask(port, 0)
    except (OSError, SystemExit):
        return False
    return True


def show(name: str, megabytes: int, transfers: list[float], opens: list[float]) -> None:
    speed = [megabytes / taken for taken in transfers]
    median, least, most = summary(speed)
    row(f"{name}: throughput", f"{median:.0f} ({least:.0f}-{most:.0f}) MiB/s")
    median, least, most = summary([taken * 1000 for taken in opens])
    row(f"{name}: open, one byte, close", f"{median:.1f} ({least:.1f}-{most:.1f}) ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=48)
    arguments = parser.parse_args()
    size, rounds = arguments.megabytes, arguments.rounds
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}; median (least-most)")
    with scratch_home() as env:
        run([QVM, "start", "bench", "--runtime", "none", "--mount", "none"], env)
        run([QVM, "ssh", "bench", "--", "sudo", "systemd-run", "--unit=sender", "python3", "-c", SERVER], env)
        wait_until(lambda: answers(9700), Deadline(60, "the forwarded port"))
        folder = Path(env["QVM_HOME"]) / "_instances" / "bench"
        status = json.loads(run([QVM, "status", "bench", "--json"], env))["result"]
        show("agent streams", size, [ask(9700, size) for _ in range(rounds)], [ask(9700, 0) for _ in range(20)])
        with openssh_tunnel(folder / "ssh" / "config", env) as port:
            show("OpenSSH -L", size, [ask(port, size) for _ in range(rounds)], [ask(port, 0) for _ in range(20)])
        target = SshTarget(status["ssh_port"], status["user"], folder / "ssh" / "id_ed25519",
                           (folder / "ssh" / "host_ed25519.pub").read_text().strip())
        show("paramiko", size, asyncio.run(ask_paramiko(target, size, rounds)),
             asyncio.run(ask_paramiko(target, 0, 20)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

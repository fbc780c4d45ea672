"""The ways from the host to a program in the guest, next to each other and to the guest itself.

    python benchmarks/network.py [--rounds 3] [--megabytes 32] [--at-once 500]

One machine, one run: within the guest (a client there), the agent's streams (what TCP forwards use), QEMU's user
network (`--port-forwarder user`), OpenSSH -L, paramiko (`--port-forwarder ssh`). Compare figures of one run only.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common import QVM, machine, row, run, scratch_home, summary

from qvm.config.ports import parse_rule
from qvm.guest.forward import PortForwarder
from qvm.guest.ssh import SshConnection, SshTarget
from qvm.wait import Deadline, wait_until

PORT = 9700
NEW_PORT = 9750

# What a connection does is in its first 16 bytes: echo, send so many MiB, receive, say "bye", listen at a port.
SERVER = f"""
import socket, threading
BLOCK = bytes(1 << 20)
def answer(peer):
    with peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = peer.recv(16, socket.MSG_WAITALL)
        kind, number = head[:1], int(head[1:].strip() or b"0")
        if kind == b"e":
            while data := peer.recv(65536): peer.sendall(data)
        elif kind == b"s":
            for _ in range(number): peer.sendall(BLOCK)
        elif kind == b"r":
            count = 0
            while data := peer.recv(1 << 20): count += len(data)
            peer.sendall(str(count).encode())
        elif kind == b"b":
            peer.sendall(b"bye")
        elif kind == b"l":
            with socket.create_server(("127.0.0.1", number)) as listener:
                peer.sendall(b"bye")
                other, _ = listener.accept()
                other.sendall(b"bye")
                other.close()
def safely(peer):
    try: answer(peer)
    except OSError as error: print(error)
listener = socket.create_server(("0.0.0.0", {PORT}), backlog=1024)
while True:
    threading.Thread(target=safely, args=(listener.accept()[0],), daemon=True).start()
"""

# Within the guest: milliseconds of round trips, of short connections, and MiB/s.
CLIENT = f"""
import socket, sys, time, json
ROUNDS, SIZE = {{rounds}}, {{size}}
def connect():
    peer = socket.create_connection(("127.0.0.1", {PORT}))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return peer
peer, trips, opens, speeds = connect(), [], [], []
peer.sendall(b"e".ljust(16)); time.sleep(0.2)
for _ in range(200):
    began = time.perf_counter(); peer.sendall(bytes(32)); peer.recv(64); trips.append(time.perf_counter() - began)
for _ in range(30):
    began = time.perf_counter(); other = connect(); other.sendall(b"b".ljust(16))
    while other.recv(16): pass
    other.close(); opens.append(time.perf_counter() - began)
for _ in range(ROUNDS):
    began = time.perf_counter(); other = connect(); other.sendall((b"s%d" % SIZE).ljust(16)); left = SIZE << 20
    while left: left -= len(other.recv(1 << 20))
    speeds.append(SIZE / (time.perf_counter() - began))
print(json.dumps([trips, opens, speeds]))
"""


@dataclass(frozen=True)
class Way:
    name: str
    host: str
    port: int

    def connect(self) -> socket.socket:
        peer = socket.create_connection((self.host, self.port), timeout=120)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return peer


def round_trips(way: Way) -> list[float]:
    with way.connect() as peer:
        peer.sendall(b"e".ljust(16))
        time.sleep(0.2)
        return [timed(lambda: exchange(peer)) for _ in range(200)]


def exchange(peer: socket.socket) -> None:
    peer.sendall(bytes(32))
    left = 32
    while left:
        left -= len(peer.recv(64))


def short_connection(way: Way) -> None:
    with way.connect() as peer:
        peer.sendall(b"b".ljust(16))
        said = b""
        while data := peer.recv(16):
            said += data
    if said != b"bye":
        raise OSError(f"{way.name}: {said!r} instead of bye")


def down(way: Way, size: int) -> float:
    began = time.perf_counter()
    with way.connect() as peer:
        peer.sendall((b"s%d" % size).ljust(16))
        left = size << 20
        while left and (data := peer.recv(1 << 20)):
            left -= len(data)
    if left:
        raise SystemExit(f"{way.name}: {left} bytes are missing")
    return size / (time.perf_counter() - began)


def up(way: Way, size: int) -> float:
    block = bytes(1 << 20)
    with way.connect() as peer:
        peer.sendall(b"r".ljust(16))
        began = time.perf_counter()
        for _ in range(size):
            peer.sendall(block)
        peer.shutdown(socket.SHUT_WR)
        count = peer.recv(32)
        taken = time.perf_counter() - began
    if int(count) != size << 20:
        raise SystemExit(f"{way.name}: {count!r} bytes arrived")
    return size / taken


def at_once(way: Way, count: int) -> tuple[float, int]:
    """(seconds until all are done, how many failed)."""
    failed: list[str] = []

    def one() -> None:
        try:
            short_connection(way)
        except OSError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(count)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began, len(failed)


def listen_to_reachable(way: Way, port: int) -> float:
    """Seconds from listen() in the guest until the host's connection is answered by that program."""
    with way.connect() as peer:
        peer.sendall((b"l%d" % port).ljust(16))
        if peer.recv(16) != b"bye":
            raise SystemExit("the guest did not listen")
        began = time.perf_counter()
        other = Way("new", "127.0.0.1", port)
        while True:
            try:
                with other.connect() as found:
                    if found.recv(16) == b"bye":
                        return time.perf_counter() - began
            except OSError:
                time.sleep(0.001)


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def show(name: str, values: list[float], unit: str, goal: str = "") -> float:
    """Returns the best: what others on the machine do makes values worse, never better."""
    median, least, most = summary([value * 1000 for value in values] if unit == "ms" else values)
    digits = 2 if unit == "ms" else 1
    row(name, f"{median:.{digits}f} ({least:.{digits}f}-{most:.{digits}f}) {unit}", goal)
    return least if unit == "ms" else most


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def openssh(config: Path, env: dict[str, str]) -> Iterator[Way]:
    way = Way("OpenSSH -L", "127.0.0.1", free_port())
    words = ["ssh", "-F", str(config), "-o", "ControlMaster=no", "-o", "ControlPath=none", "-N",
             "-L", f"127.0.0.1:{way.port}:127.0.0.1:{PORT}", "qvm-bench"]
    child = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(way), Deadline(60, "ssh -L"))
        yield way
    finally:
        child.terminate()
        child.wait()


@contextmanager
def paramiko(target: SshTarget) -> Iterator[Way]:
    """qvm's own SSH tunnel in a thread, as a supervisor with `--port-forwarder ssh` has it."""
    way = Way("paramiko", "127.0.0.1", free_port())
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        ssh = SshConnection(target)
        await ssh.wait_ready(Deadline(60))
        forwarder = PortForwarder(ssh, rules=[parse_rule(f"{way.port}:{PORT}")])
        forwarder.set_listeners([("127.0.0.1", PORT)])
        ready.set()
        await end.wait()
        await forwarder.close()
        await ssh.close()

    ready, end = threading.Event(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        if not ready.wait(90):
            raise SystemExit("no SSH connection")
        yield way
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()


def answers(way: Way) -> bool:
    try:
        short_connection(way)
    except OSError:
        return False
    return True


def measure(way: Way, rounds: int, size: int, count: int, own: float) -> dict[str, float]:
    trip = show(f"{way.name}: round trip of 32 bytes", round_trips(way), "ms", f"least: {own:.2f} + 1 ms")
    show(f"{way.name}: connect, three bytes, end", [timed(lambda: short_connection(way)) for _ in range(30)], "ms")
    result = {
        "trip": trip,
        "down": show(f"{way.name}: out of the guest", [down(way, size) for _ in range(rounds)], "MiB/s"),
        "up": show(f"{way.name}: into the guest", [up(way, size) for _ in range(rounds)], "MiB/s"),
    }
    seconds, failed = at_once(way, count)
    row(f"{way.name}: {count} connections at once", f"{seconds:.1f} s, {failed} failed")
    return result


def measure_all(env: dict[str, str], rounds: int, size: int, count: int) -> None:
    # A wildcard listener: with `user`, 127.0.0.1 is QEMU's and [::1] ours, so both ways lead to one program.
    run([QVM, "start", "bench", "--runtime", "none", "--mount", "none", "--port-forwarder", "user"], env)
    run([QVM, "ssh", "bench", "--", "sudo", "systemd-run", "--unit=server", "python3", "-c", SERVER], env)
    streams, network = Way("agent streams", "::1", PORT), Way("user network", "127.0.0.1", PORT)
    wait_until(lambda: answers(streams) and answers(network), Deadline(60, "the forwards"))
    folder = Path(env["QVM_HOME"]) / "_instances" / "bench"
    status = json.loads(run([QVM, "status", "bench", "--json"], env))["result"]
    words = CLIENT.replace("{rounds}", str(rounds)).replace("{size}", str(size))
    trips, opens, speeds = json.loads(run([QVM, "ssh", "bench", "--", "python3", "-c", words], env))
    own = show("the guest itself: round trip of 32 bytes", trips, "ms")
    show("the guest itself: connect, three bytes, end", opens, "ms")
    show("the guest itself: throughput", speeds, "MiB/s")
    target = SshTarget(status["ssh_port"], status["user"], folder / "ssh" / "id_ed25519",
                       (folder / "ssh" / "host_ed25519.pub").read_text().strip())
    found = {way.name: measure(way, rounds, size, count, own) for way in (streams, network)}
    with openssh(folder / "ssh" / "config", env) as way:
        found[way.name] = measure(way, rounds, size, count, own)
    with paramiko(target) as way:
        found[way.name] = measure(way, rounds, size, count, own)
    delays = [listen_to_reachable(streams, NEW_PORT + number) for number in range(20)]
    show("listen() in the guest to an answer on the host", delays, "ms", "200 ms")
    ssh = found["OpenSSH -L"]
    for name, goal in (("agent streams", "0.9 of OpenSSH"), ("user network", "2 times OpenSSH")):
        for which in ("down", "up"):
            row(f"{name}: {which}, best, times OpenSSH -L", f"{found[name][which] / ssh[which]:.1f}", goal)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=500)
    arguments = parser.parse_args()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}; load {load}; median (least-most)")
    with scratch_home() as env:
        measure_all(env, arguments.rounds, arguments.megabytes, arguments.at_once)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How quickly a runtime is there, what its host socket costs, and what it costs while nobody uses it.

    python benchmarks/runtimes.py [--runtimes docker containerd podman] [--rounds 3] [--idle 60]

Fork to usable: `qvm start` of a new profile, typed, until the runtime's client on the host has an answer; the warm
image is there (a first start, not counted, makes it). Idle: the CPU time of QEMU and of the supervisor over `--idle`
seconds, beginning ten seconds after the last command.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import shutil
import socket
import subprocess
import tarfile
import time
from pathlib import Path

from common import QVM, machine, row, run, scratch_home, summary, timed

GOALS = {"docker": 1.5, "containerd": 1.2, "podman": 1.5}
RATIO = 1.3
IDLE = 2.0
"""Per cent of one core."""


def seconds(values: list[float]) -> str:
    median, least, most = summary(values)
    return f"{median:.2f} ({least:.2f}-{most:.2f}) s"


def ask(runtime: str, env: dict[str, str]) -> None:
    """The runtime's first answer on the host."""
    sockets = json.loads(run([QVM, "status", "bench", "--json"], env))["result"]["sockets"]
    path = next(iter(sockets.values()))
    if runtime == "containerd":  # it speaks gRPC: that it takes a connection and its greeting is the answer
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(path)
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))
            if not connection.recv(9):
                raise SystemExit("containerd does not answer")
    else:
        run(["docker", "-H", f"unix://{path}", "info"], env)


def measure_forks(runtime: str, env: dict[str, str], rounds: int) -> None:
    start = [QVM, "start", "bench", "--runtime", runtime, "--mount", "none"]
    run(start, env)
    times = []
    for _ in range(rounds):
        run([QVM, "delete", "bench", "-f", "--data"], env)
        times.append(timed(lambda: (run(start, env), ask(runtime, env))))
    row(f"{runtime}: fork to usable", seconds(times), f"goal {GOALS[runtime]:g} s")


def import_busybox(env: dict[str, str]) -> None:
    program = Path("/bin/busybox")
    if not program.exists():
        raise SystemExit("busybox-static is needed: apt-get install busybox-static")
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.add(program, "bin/busybox")
        for name in ("sh", "true"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(link)
    done = subprocess.run(["docker", "import", "-", "busybox"], input=out.getvalue(), env=env, capture_output=True,
                          check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr.decode())


def measure_run(env: dict[str, str], rounds: int) -> None:
    """Alternating, so that both meet the same load. In the guest the time is taken there: no SSH login counts."""
    import_busybox(env)
    words = "docker run --rm busybox true"
    program = f'import subprocess, time; t = time.time(); subprocess.run("{words}".split()); print(time.time() - t)'
    inside = f"python3 -c {shlex.quote(program)}"
    host, guest = [], []
    run(words.split(), env)
    for _ in range(rounds):
        host.append(timed(lambda: run(words.split(), env)))
        guest.append(float(run([QVM, "ssh", "bench", "--", inside], env).strip()))
    row("docker run --rm busybox true, host socket", seconds(host))
    row("    the same in the VM", seconds(guest))
    row("    ratio of the medians", f"{summary(host)[0] / summary(guest)[0]:.2f}", f"goal {RATIO:g}")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process (proc(5): fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_idle(runtime: str, env: dict[str, str], length: float) -> None:
    status = json.loads(run([QVM, "status", "bench", "--json"], env))["result"]
    pids = {"QEMU": int(status["pid"]), "supervisor": int(status["supervisor_pid"])}
    time.sleep(10)
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    began = time.monotonic()
    time.sleep(length)
    passed = time.monotonic() - began
    used = {name: (cpu_seconds(pid) - before[name]) / passed * 100 for name, pid in pids.items()}
    row(f"{runtime}: idle, of one core", f"{sum(used.values()):.2f} %", f"goal {IDLE:g} %")
    for name, value in used.items():
        row(f"    {name}", f"{value:.2f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle", type=float, default=60.0, metavar="SECONDS", help="0: not measured")
    options = parser.parse_args()
    if shutil.which("docker") is None:
        raise SystemExit("the docker CLI is needed")
    print(machine(), f"load {os.getloadavg()[0]:.1f}")
    with scratch_home() as env:
        for runtime in options.runtimes:
            measure_forks(runtime, env, options.rounds)
            if runtime == "docker":
                measure_run(env, options.rounds)
            if options.idle:
                measure_idle(runtime, env, options.idle)
            run([QVM, "delete", "bench", "-f", "--data"], env)


if __name__ == "__main__":
    main()

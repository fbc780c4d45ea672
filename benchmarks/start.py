"""How long a start takes and where the time goes, with what users wait for afterwards.

    python benchmarks/start.py [--runtime docker] [--rounds 3] [--memory 2]

Cold starts, from the command to `docker info` through the host socket (or the containerd socket accepting), with
the requirements' own times; then `status`, `--help`, agent round trips, `stop` and the supervisor's memory.
Compare figures of one run only: machines differ, and the same machine differs by the hour.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

from common import QVM, machine, row, run, scratch_home, summary, timed

from qvm.supervisor.client import call


def milliseconds(values: list[float]) -> str:
    median, least, most = summary([value * 1000 for value in values])
    return f"{median:.0f} ({least:.0f}-{most:.0f}) ms"


def seconds(values: list[float]) -> str:
    median, least, most = summary(values)
    return f"{median:.1f} ({least:.1f}-{most:.1f}) s"


def proportional_memory(pid: int) -> float:
    """PSS in MiB, from proc(5) smaps_rollup: shared pages are counted by share."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    match = re.search(r"^Pss:\s+(\d+) kB", text, re.M)
    return int(match.group(1)) / 1024 if match else float("nan")


def supervisor_events(folder: Path) -> dict[str, float]:
    found: dict[str, float] = {}

    def see(event: dict[str, object]) -> None:
        if event.get("event") == "requirement" and event.get("state") == "done":
            found[str(event["name"])] = float(str(event["seconds"]))

    call(folder / "ctl.sock", "watch", on_event=see)
    return found


def measure_instance(arguments: argparse.Namespace, env: dict[str, str]) -> None:
    start = [QVM, "start", "bench", "--mount", "none"]
    start += ["--runtime", arguments.runtime, "--memory", str(arguments.memory)]
    os.environ.update(env)
    folder = Path(env["QVM_HOME"]) / "_instances" / "bench"
    first, again, stops, phases = [], [], [], []

    def wait_runtime() -> None:
        run(start, env)
        if arguments.runtime == "docker":
            run(["docker", "info"], env)

    for number in range(arguments.rounds):
        first.append(timed(wait_runtime))
        phases.append(supervisor_events(folder))
        stops.append(timed(lambda: run([QVM, "stop", "bench"], env)))
        again.append(timed(wait_runtime))
        if number < arguments.rounds - 1:
            run([QVM, "delete", "bench", "-f", "--data"], env)
    row(f"cold start, new instance, to {arguments.runtime} answering", seconds(first), "goal 25 s")
    for name in phases[0]:
        row(f"    requirement {name}, since QEMU began", seconds([entry[name] for entry in phases]))
    row("cold start, existing instance", seconds(again))
    row("qvm stop", seconds(stops), "goal 5 s")
    status = json.loads(run([QVM, "status", "bench", "--json"], env))["result"]
    row("qvm status", milliseconds([timed(lambda: run([QVM, "status", "bench"], env)) for _ in range(15)]),
        "goal 150 ms")
    row("qvm --help", milliseconds([timed(lambda: run([QVM, "--help"], env)) for _ in range(15)]), "goal 120 ms")
    trips = [timed(lambda: call(folder / "ctl.sock", "exec", argv=["true"])) for _ in range(50)]
    row("agent exec round trip (true)", milliseconds(trips), "goal 20 ms")
    row("supervisor memory (PSS)", f"{proportional_memory(status['supervisor_pid']):.0f} MiB", "goal 60 MB")
    row("QEMU memory (RSS)", f"{status['memory_used'] / 2**20:.0f} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", default="docker")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=float, default=2)
    arguments = parser.parse_args()
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}; median (least-most)")
    with scratch_home() as env:
        measure_instance(arguments, env)
    return 0


if __name__ == "__main__":
    sys.exit(main())

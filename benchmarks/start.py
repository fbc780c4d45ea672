"""How long a start takes and where the time goes, cold and forked side by side, with what users wait for afterwards.

    python benchmarks/start.py [--runtime docker] [--rounds 3] [--forks 8] [--only cold,fork,run,together,rest]

Starts are timed from the command to `docker info` through the host socket (or the containerd socket accepting).
Compare figures of one run only: machines differ, and the same machine differs by the hour.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from common import QVM, machine, row, run, scratch_home, summary, timed

from qvm.supervisor.client import call
from qvm.supervisor.throwaway import Machine


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


def starter(arguments: argparse.Namespace, env: dict[str, str], *more: str) -> Callable[[], None]:
    """A start of the instance `bench`, until its runtime answers on the host."""
    argv = [QVM, "start", "bench", "--mount", "none", "--runtime", arguments.runtime, *more]

    def start() -> None:
        run(argv, env)
        if arguments.runtime == "docker":
            run(["docker", "info"], env)

    return start


def measure_starts(
    arguments: argparse.Namespace, env: dict[str, str], name: str, *more: str, goal: str = ""
) -> list[float]:
    """Rounds of start, stop and delete; the starts' seconds."""
    folder = Path(env["QVM_HOME"]) / "_instances" / "bench"
    starts, stops, phases = [], [], []
    for _ in range(arguments.rounds):
        starts.append(timed(starter(arguments, env, *more)))
        phases.append(supervisor_events(folder))
        stops.append(timed(lambda: run([QVM, "stop", "bench"], env)))
        run([QVM, "delete", "bench", "-f", "--data"], env)
    row(f"{name}, new instance, to {arguments.runtime} answering", seconds(starts), goal)
    for part in phases[0]:
        row(f"    {part}", milliseconds([entry[part] for entry in phases]))
    row("    qvm stop after it", seconds(stops), "goal 5 s")
    return starts


def measure_freeze(arguments: argparse.Namespace, env: dict[str, str]) -> None:
    warm = json.loads(run([QVM, "image", "warm", "--runtime", arguments.runtime, "--json"], env))["result"]
    parts = json.loads((Path(warm["folder"]) / "manifest.json").read_text())["timings"]
    row("freeze of a warm image, beyond its boot", f"{1000 * (parts['warm quiet'] + parts['warm freeze']):.0f} ms",
        "goal 500 ms")
    for part, value in parts.items():
        row(f"    {part}", f"{1000 * value:.0f} ms")


def measure_runs(arguments: argparse.Namespace, env: dict[str, str]) -> None:
    """`qvm run -- true`, whole, and where its time goes."""
    argv = [QVM, "run", "-v", "--", "true"]
    run(argv, env)
    times, parts = [], []
    for _ in range(max(5, arguments.rounds)):
        began = time.perf_counter()
        done = subprocess.run(argv, env=env, cwd=env["QVM_HOME"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - began)
        parts.append({name: float(value) for name, value in re.findall(r"(\w+) (\d+) ms", done.stderr)})
    row("qvm run -- true", milliseconds(times), "goal 1000 ms")
    for part in parts[0]:
        row(f"    {part}", milliseconds([entry[part] / 1000 for entry in parts if part in entry]))
    agent = [sum(entry[part] for part in ("spawn", "restore", "agent")) / 1000 for entry in parts]
    row("    fork to agent answering (spawn + restore + agent)", milliseconds(agent), "goal 400 ms")


async def come_up(machine: Machine, answered: list[float]) -> None:
    await machine.bring_up({})
    answered.append(time.perf_counter())


def measure_together(arguments: argparse.Namespace, env: dict[str, str]) -> None:
    """Forks at the same moment: until the last one's agent has answered; then what memory they share."""
    from qvm.commands.run_plan import Wish, plan_run
    from qvm.progress import NullProgress
    from qvm.supervisor.throwaway import launch

    plan, _ = plan_run(Wish(flags={"mounts": ("none",)}, cwd=Path("/")), progress=NullProgress())
    used: dict[int, float] = {}
    for count in (2, arguments.forks, 10):
        barrier, answered, ends = threading.Barrier(count + 1), [], threading.Event()

        def one(barrier: threading.Barrier, answered: list[float], ends: threading.Event) -> None:
            barrier.wait()
            with launch(plan, {}) as machine:
                asyncio.run(come_up(machine, answered))
                ends.wait()

        threads = [threading.Thread(target=one, args=(barrier, answered, ends)) for _ in range(count)]
        for thread in threads:
            thread.start()
        barrier.wait()
        began = time.perf_counter()
        while len(answered) < count and time.perf_counter() - began < 120:
            time.sleep(0.01)
        time.sleep(10)
        mine = [pid for pid in children() if "qemu-system" in Path(f"/proc/{pid}/cmdline").read_text()]
        used[count] = sum(proportional_memory(pid) for pid in mine)
        ends.set()
        for thread in threads:
            thread.join()
        row(f"{count} forks at once, until the last is personalised", seconds([max(answered) - began]),
            "goal 2.5 s" if count == arguments.forks else "")
    for count, memory in used.items():
        row(f"memory of {count} idle forks (PSS)", f"{memory:.0f} MiB")
    row("memory of 10 forks, times that of 2", f"{used[10] / used[2]:.1f}", "goal 1.5")


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()] + [
        int(pid) for task in Path(f"/proc/{os.getpid()}/task").iterdir() if task.name != str(os.getpid())
        for pid in (task / "children").read_text().split()
    ]


def measure_rest(arguments: argparse.Namespace, env: dict[str, str]) -> None:
    folder = Path(env["QVM_HOME"]) / "_instances" / "bench"
    starter(arguments, env)()
    run([QVM, "stop", "bench"], env)
    row("cold start, existing instance", seconds([timed(starter(arguments, env))]))
    status = json.loads(run([QVM, "status", "bench", "--json"], env))["result"]
    row("qvm status", milliseconds([timed(lambda: run([QVM, "status", "bench"], env)) for _ in range(15)]),
        "goal 150 ms")
    row("qvm --help", milliseconds([timed(lambda: run([QVM, "--help"], env)) for _ in range(15)]), "goal 120 ms")
    trips = [timed(lambda: call(folder / "ctl.sock", "exec", argv=["true"])) for _ in range(50)]
    row("agent exec round trip (true)", milliseconds(trips), "goal 20 ms")
    row("supervisor memory (PSS)", f"{proportional_memory(status['supervisor_pid']):.0f} MiB", "goal 60 MB")
    row("QEMU memory (RSS)", f"{status['memory_used'] / 2**20:.0f} MiB")
    run([QVM, "delete", "bench", "-f", "--data"], env)


def measure(arguments: argparse.Namespace, env: dict[str, str]) -> None:
    wanted = arguments.only.split(",")
    os.environ.update(env)
    run([QVM, "image", "warm", "--runtime", arguments.runtime], env)
    cold, fork = [], []
    if "cold" in wanted:
        cold = measure_starts(arguments, env, "cold start", "--cold", goal="goal 25 s")
    if "fork" in wanted:
        starter(arguments, env)()  # what is read for the first time after a boot of the host is read now
        run([QVM, "delete", "bench", "-f", "--data"], env)
        fork = measure_starts(arguments, env, "fork", goal="goal 1.5 s")
        measure_freeze(arguments, env)
    if cold and fork:
        row("cold, times the fork", f"{summary(cold)[0] / summary(fork)[0]:.1f}", "goal 15")
    if "run" in wanted:
        measure_runs(arguments, env)
    if "together" in wanted:
        measure_together(arguments, env)
    if "rest" in wanted:
        measure_rest(arguments, env)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", default="docker")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forks", type=int, default=8)
    parser.add_argument("--only", default="cold,fork,run,together,rest")
    arguments = parser.parse_args()
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}; median (least-most)")
    with scratch_home() as env:
        Path(env["QVM_HOME"]).mkdir(exist_ok=True)
        measure(arguments, env)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Kubernetes: from a fork to a Ready node, and what an idle node costs the host.

    QVM_K3S=/path/to/k3s python benchmarks/kubernetes.py [--rounds 3] [--idle 60] [--runtime containerd]

A k3s of one's own (QVM_K3S, a binary or a folder with images too), or the pinned release. Each round needs a warm image
of its own, since k3s's keys are nobody else's; these are made first and not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import psutil
from common import QVM, machine, row, run, scratch_home, summary, timed

ARGS = ["--kubernetes", "--k3s-arg=--disable=coredns,traefik,servicelb,metrics-server,local-storage"]
"""Only k3s itself: its own pods come from images that not every machine can fetch."""


def node_ready(env: dict[str, str], profile: str) -> bool:
    """Asked as a user would; takes seconds of its own in an emulated guest."""
    argv = [QVM, "ssh", profile, "-T", "--", "sudo kubectl get node qvm -o jsonpath={.status.conditions[-1:].status}"]
    return run(argv, env, check=False).strip() == "True"


def idle_share(env: dict[str, str], profile: str, seconds: float) -> float:
    """Per cent of one core that QEMU and the supervisor take while nothing is asked of them."""
    folder = Path(env["QVM_HOME"]) / "_instances" / profile
    document = json.loads((folder / "run.json").read_text())
    status = json.loads(run([QVM, "status", profile, "--json"], env))["result"]
    pids = [int(document["qemu"]["pid"]), int(status["supervisor_pid"])]

    def used() -> float:
        return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)

    before, began = used(), time.monotonic()
    time.sleep(seconds)
    return 100.0 * (used() - before) / (time.monotonic() - began)


def measure(*, runtime: str, rounds: int, idle: float) -> None:
    with scratch_home() as env:
        base = ["--runtime", runtime, *ARGS]
        row("warm images", f"{timed(lambda: run([QVM, 'image', 'warm', *base, '--count', str(rounds)], env)):.0f} s")
        times = []
        for number in range(rounds):
            name = f"k{number}"
            times.append(timed(lambda name=name: run([QVM, "start", name, "--mount", "none", *base], env)))
            if not node_ready(env, name):
                raise SystemExit("the node is not Ready after a start that said so")
            if number < rounds - 1:
                run([QVM, "delete", name, "-f", "--data"], env)
        median, least, most = summary(times)
        row("start of a fork until its node is Ready", f"{median:.1f} ({least:.1f}-{most:.1f}) s", "goal 6 s")
        time.sleep(30)  # what a user has just asked for has ended
        row(f"idle for {idle:g} s", f"{idle_share(env, f'k{rounds - 1}', idle):.1f} % of a core", "goal 15 %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle", type=float, default=60.0)
    parser.add_argument("--runtime", default="containerd")
    arguments = parser.parse_args()
    print(machine())
    measure(runtime=arguments.runtime, rounds=arguments.rounds, idle=arguments.idle)


if __name__ == "__main__":
    main()

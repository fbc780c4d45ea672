"""How long it takes to suspend, resume, snapshot, restore and copy a VM, and how long it stands still.

    python benchmarks/states.py [--runtime docker] [--rounds 5]

Commands are timed whole, as typed; and, where docker is to answer, until `docker info` has through the host socket. Two
guests: one forked from a warm image, one booted cold, all of whose memory must be saved.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from common import QVM, machine, row, run, scratch_home, summary, timed


def milliseconds(values: list[float]) -> str:
    median, least, most = summary([value * 1000 for value in values])
    return f"{median:.0f} ({least:.0f}-{most:.0f}) ms"


class Measured:
    """Commands of one kind: whole times, and what each said of itself."""

    def __init__(self, env: dict[str, str]) -> None:
        self._env = env
        self.times: list[float] = []
        self.answers: list[float] = []
        """The whole, until the runtime answered."""
        self.results: list[dict[str, Any]] = []

    def do(self, *words: str, then: list[str] | None = None) -> None:
        said: list[str] = []
        self.times.append(timed(lambda: said.append(run([QVM, *words, "--json"], self._env))))
        self.results.append(json.loads(said[0])["result"])
        if then is not None:
            self.answers.append(self.times[-1] + timed(lambda: run(then, self._env)))

    def show(self, name: str, goal: str = "", *, paused: str = "", answered: str = "") -> None:
        row(name, milliseconds(self.times), goal)
        if self.answers:
            row("    until the runtime answered", milliseconds(self.answers), answered)
        if any(result.get("paused") for result in self.results):
            row("    stands still", milliseconds([result["paused"] for result in self.results]), paused)
        timings = [result.get("timings") or {} for result in self.results]
        for part in timings[0]:
            row(f"    {part}", milliseconds([entry[part] for entry in timings if part in entry]))


def measure_suspend(env: dict[str, str], answer: list[str] | None, rounds: int) -> None:
    suspends, resumes = Measured(env), Measured(env)
    log = Path(env["QVM_HOME"]) / "_instances" / "bench" / "supervisor.log"
    for _ in range(rounds):
        suspends.do("suspend", "bench")
        resumes.do("resume", "bench", then=answer)
    suspends.show("qvm suspend", "goal 2000 ms")
    resumes.show("qvm resume", answered="goal 1500 ms")
    found = re.findall(r"suspended: .*copied=(\d+)", log.read_text())
    row("    RAM written by a suspend", f"{int(found[-1]) / 2**20:.0f} MiB")


def measure_snapshots(env: dict[str, str], answer: list[str] | None, rounds: int) -> None:
    creates, restores, deletes = Measured(env), Measured(env), Measured(env)
    for number in range(rounds):
        creates.do("snapshot", "create", "bench", f"s{number}")
    for number in range(rounds):
        restores.do("snapshot", "restore", "bench", f"s{number}", then=answer)
    for number in range(rounds):
        deletes.do("snapshot", "delete", "bench", f"s{number}")
    creates.show("qvm snapshot create, running", "goal 1000 ms", paused="goal 300 ms")
    restores.show("qvm snapshot restore, running", "goal 1000 ms")
    deletes.show("qvm snapshot delete")


def measure_clones(env: dict[str, str], rounds: int) -> None:
    clones, starts = Measured(env), Measured(env)
    for number in range(rounds):
        clones.do("clone", "bench", f"bench{number}")
        starts.do("start", f"bench{number}")
        run([QVM, "delete", f"bench{number}", "-f", "--data"], env)
    clones.show("qvm clone, running")
    starts.show("qvm start of the copy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", default="docker")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="fork,cold")
    arguments = parser.parse_args()
    print(machine())
    answer = ["docker", "info"] if arguments.runtime == "docker" else None
    for how in arguments.only.split(","):
        with scratch_home() as env:
            print(f"--- a guest of 2 GiB with {arguments.runtime}, {how}")
            run([QVM, "start", "bench", "--runtime", arguments.runtime, "--memory", "2", "--mount", "none",
                 *(["--cold"] if how == "cold" else [])], env)
            measure_suspend(env, answer, arguments.rounds)
            measure_snapshots(env, answer, arguments.rounds)
            measure_clones(env, min(arguments.rounds, 3))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the benchmarks share: a scratch QVM_HOME, timing, and a table with the machine named."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

QVM = str(Path(sys.executable).with_name("qvm"))


@contextmanager
def scratch_home() -> Iterator[dict[str, str]]:
    """An environment with an empty QVM_HOME and docker configuration; every instance is deleted at the end."""
    home = Path(tempfile.mkdtemp(prefix="qvmb", dir="/tmp"))
    env = {**os.environ, "QVM_HOME": str(home / "q"), "DOCKER_CONFIG": str(home / "docker")}
    (home / "docker").mkdir()
    try:
        yield env
    finally:
        subprocess.run([QVM, "delete", "--all", "-f", "--data"], env=env, check=False, capture_output=True)
        shutil.rmtree(home, ignore_errors=True)


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def run(argv: list[str], env: dict[str, str], *, check: bool = True) -> str:
    done = subprocess.run(argv, env=env, check=False, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise SystemExit(f"{' '.join(argv)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def summary(values: list[float]) -> tuple[float, float, float]:
    """(median, least, most)."""
    return statistics.median(values), min(values), max(values)


def machine() -> str:
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"


def row(name: str, value: str, goal: str = "") -> None:
    print(f"{name:<52} {value:>24}   {goal}", flush=True)

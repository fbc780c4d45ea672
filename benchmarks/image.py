"""How long the default image takes to build, phase by phase: nothing cached, packages cached, base cached; then for
another architecture. CPU seconds tell more than seconds where others use the machine too.

    python benchmarks/image.py                  nothing cached, packages cached, nothing to do
    python benchmarks/image.py --arch aarch64   that architecture: nothing cached, packages cached
    python benchmarks/image.py --twice          two builds of the same packages, and whether they are the same

Uses a cache folder of its own. The compiled tools (nerdctl, BuildKit) are taken from the user's cache where they are
there, since Go's compile time says nothing about the image; where not, that time is in the first figure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import QVM, machine, row

from qvm import paths


def build(name: str, env: dict[str, str], goal: str = "", *words: str) -> str:
    """Time one build and return the image's id."""
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([QVM, "image", "build", "debian-13", "--json", *words], env=env, capture_output=True,
                          text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    row(name, f"{time.perf_counter() - began:.1f} s", f"{cpu:.0f} s of CPU; {goal}" if goal else f"{cpu:.0f} s of CPU")
    for line in done.stderr.splitlines():
        if match := re.match(r"(.*): done in (.*)", line):
            row(f"    {match[1]}", match[2])
    return str(json.loads(done.stdout)["result"]["id"])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default=None)
    parser.add_argument("--twice", action="store_true")
    wanted = parser.parse_args()
    arch = ["--arch", wanted.arch] if wanted.arch else []
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}")
    folder = Path(tempfile.mkdtemp(prefix="qvmb", dir="/var/tmp"))
    tools = paths.cache_home() / "tools"
    env = {**os.environ, "QVM_CACHE_HOME": str(folder), "QVM_HOME": str(folder / "q")}
    try:
        if tools.is_dir():
            shutil.copytree(tools, folder / "tools")
        first = build("image build, nothing cached", env, "goal 300 s" if arch else "goal 100 s", *arch)
        second = build("image build --force, packages cached", env, "" if arch else "goal 60 s", "--force", *arch)
        if wanted.twice:
            row("the same image twice", "yes" if first == second else "NO", f"{first[:12]} {second[:12]}")
        build("image build, nothing to do", env, "", *arch)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

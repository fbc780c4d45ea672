"""How long the default image takes to build, phase by phase: nothing cached, packages cached, base cached.

    python benchmarks/image.py

Uses a cache folder of its own. The compiled tools (nerdctl, BuildKit) are taken from the user's cache where they are
there, since Go's compile time says nothing about the image; where not, that time is in the first figure.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import QVM, machine, row

from qvm import paths


def build(name: str, env: dict[str, str], goal: str = "", *words: str) -> None:
    began = time.perf_counter()
    done = subprocess.run([QVM, "image", "build", "debian-13", *words], env=env, capture_output=True, text=True,
                          check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    row(name, f"{time.perf_counter() - began:.1f} s", goal)
    for line in done.stderr.splitlines():
        if match := re.match(r"(.*): done in (.*)", line):
            row(f"    {match[1]}", match[2])


def main() -> int:
    print(f"{machine()}; {time.strftime('%Y-%m-%d')}")
    folder = Path(tempfile.mkdtemp(prefix="qvmb", dir="/var/tmp"))
    tools = paths.cache_home() / "tools"
    env = {**os.environ, "QVM_CACHE_HOME": str(folder), "QVM_HOME": str(folder / "q")}
    try:
        if tools.is_dir():
            shutil.copytree(tools, folder / "tools")
        build("image build, nothing cached", env, "goal 100 s")
        build("image build --force, packages cached", env, "goal 60 s", "--force")
        build("image build, nothing to do", env)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

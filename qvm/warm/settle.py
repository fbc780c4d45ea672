"""`python -m qvm.warm.settle FOLDER`: have a warm image reach the disk, in its own process, and say so in the folder.

Until then it counts as whole only while the host runs: writing half a gigabyte would keep a start waiting.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from qvm.paths import sync
from qvm.warm.store import MANIFEST, SYNCED


def settle(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_file():
            sync(entry)
    if (folder / MANIFEST).exists():
        (folder / SYNCED).touch()
        sync(folder)


if __name__ == "__main__":
    os.nice(10)
    settle(Path(sys.argv[1]))

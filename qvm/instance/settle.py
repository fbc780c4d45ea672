"""`python -m qvm.instance.settle FOLDER`: have a saved state reach the disk, in its own process, and say so in it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from qvm import paths
from qvm.instance.states import MANIFEST, mark_synced


def settle(folder: Path) -> bool:
    """False where the state has been used or removed meanwhile."""
    try:
        for entry in folder.iterdir():
            if entry.is_file():
                paths.sync(entry)
        if not (folder / MANIFEST).exists():
            return False
        mark_synced(folder)
    except FileNotFoundError:
        return False
    return True


if __name__ == "__main__":
    os.nice(10)
    settle(Path(sys.argv[1]))

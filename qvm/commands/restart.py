"""`qvm restart`: stop and start under one lock, applying changed settings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvm.commands.results import StartResult
from qvm.commands.start import start_locked
from qvm.commands.stop import stop_locked
from qvm.instance.store import load_record, lock_instance
from qvm.progress import Progress


def restart(
    profile: str, flags: Mapping[str, Any], *, cwd: Path, force: bool = False, progress: Progress
) -> StartResult:
    """Stop the instance if it runs and start it with `flags` applied."""
    load_record(profile)
    began = time.monotonic()
    with lock_instance(profile, on_wait=progress.note):
        stop_locked(profile, force=force, progress=progress)
        return start_locked(profile, flags, cwd=cwd, progress=progress, began=began)

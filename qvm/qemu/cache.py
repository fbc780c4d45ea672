"""Small JSON files under cache_home()/probe/: what was learned about this host, kept while it stays true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qvm import paths
from qvm.errors import HostError
from qvm.log import get_logger

log = get_logger(__name__)


def probe_dir() -> Path:
    return paths.cache_home() / "probe"


def load_entry(name: str, key: str) -> dict[str, Any] | None:
    """What was saved under `name`, if its key is still `key`; a damaged file counts as none."""
    try:
        data = json.loads((probe_dir() / name).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or data.get("key") != key or not isinstance(data.get("value"), dict):
        return None
    value: dict[str, Any] = data["value"]
    return value


def save_entry(name: str, key: str, value: dict[str, Any]) -> None:
    """Remember `value`; readers see the old file or the new one. A cache that cannot be written only costs time."""
    text = json.dumps({"key": key, "value": value}, indent=1)
    try:
        folder = paths.ensure_private_dir(probe_dir())
        paths.replace_file(folder / name, text.encode(), durable=False)
    except (OSError, HostError) as error:
        log.warning("cannot remember %s: %s", name, error)


def file_identity(path: Path) -> str:
    """Real path, mtime (ns) and size (bytes) of a file; changes when the file does."""
    real = path.resolve()
    stat = real.stat()
    return f"{real}:{stat.st_mtime_ns}:{stat.st_size}"

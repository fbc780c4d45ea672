"""Which runtime plugins are installed, by name alone: loading one is the business of `qvm.runtime.registry`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from qvm.log import get_logger

log = get_logger(__name__)

GROUP = "qvm.runtimes"


def list_runtime_names() -> tuple[str, ...]:
    """The words users may type after `--runtime`, sorted; no plugin is imported."""
    return tuple(sorted(find_plugins()))


def find_plugins() -> Mapping[str, EntryPoint]:
    """Entry points by name. Where two packages offer the same name, qvm's own wins and the log says so."""
    found = {entry.name: entry for entry in _declared_beside_checkout()}
    for entry in entry_points(group=GROUP):
        known = found.get(entry.name)
        ours = entry.dist is not None and entry.dist.name == "qvm"
        if known is not None and known.value != entry.value and not ours:
            log.warning("two runtime plugins are called %r; %s is left out", entry.name, entry.value)
            continue
        found[entry.name] = entry
    return found


def _declared_beside_checkout() -> list[EntryPoint]:
    """What pyproject.toml declares beside a checkout that runs without having been installed.

    The folders are then importable under their own names (qvm itself was), not under those the wheel gives them.
    """
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    try:
        document = tomllib.loads(path.read_text())
        if document["project"]["name"] != "qvm":
            return []
        declared: dict[str, str] = document["project"]["entry-points"][GROUP]
        folders: dict[str, str] = document["tool"]["setuptools"]["package-dir"]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return []
    entries = []
    for name, value in declared.items():
        package, dot, rest = value.partition(".")
        entries.append(EntryPoint(name, folders.get(package, package).replace("/", ".") + dot + rest, GROUP))
    return entries

"""Finds runtime plugins through the entry-point group `qvm.runtimes`; the core knows none by name.

A plugin that fails to import or is no `Runtime` spoils only itself: `list_runtimes` shows why, the others work.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from qvm.errors import HostError, UsageError
from qvm.log import get_logger
from qvm.runtime.base import Runtime

log = get_logger(__name__)

GROUP = "qvm.runtimes"


@dataclass(frozen=True, slots=True)
class RuntimeInfo:
    """One installed plugin, loaded or not."""

    name: str
    summary: str
    error: str | None = None
    """Why it cannot be used."""


def load_runtime(name: str) -> Runtime:
    """A new instance of the runtime users call `name`.

    UsageError with the nearest name where there is none, HostError where its plugin is broken.
    """
    found = _find_plugins()
    entry = found.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(found))}"
        raise UsageError(f"there is no runtime {name!r}", hint=hint)
    return _load(entry)


def list_runtimes() -> list[RuntimeInfo]:
    """All installed plugins, sorted by name; broken ones with the reason."""
    infos = []
    for name, entry in sorted(_find_plugins().items()):
        try:
            infos.append(RuntimeInfo(name, _load(entry).summary))
        except HostError as error:
            infos.append(RuntimeInfo(name, "", error.details or error.message))
    return infos


def _load(entry: EntryPoint) -> Runtime:
    try:
        loaded = entry.load()
        runtime = loaded()
    except Exception as error:  # somebody else's module may fail in any way when it is imported
        log.debug("runtime plugin %s", entry.value, exc_info=True)
        raise HostError(
            f"the runtime plugin {entry.name!r} ({entry.value}) does not load",
            hint=_reinstall_hint(entry), details=f"{type(error).__name__}: {error}",
        ) from error
    if not isinstance(runtime, Runtime):
        raise HostError(f"the runtime plugin {entry.name!r} ({entry.value}) is no qvm.runtime.base.Runtime",
                        hint=_reinstall_hint(entry))
    if runtime.name != entry.name:
        raise HostError(f"the runtime plugin {entry.name!r} ({entry.value}) calls itself {runtime.name!r}",
                        hint=_reinstall_hint(entry))
    return runtime


def _reinstall_hint(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist is not None else "qvm"
    return f"update or remove the package it comes from: pip install --upgrade {package}"


def _find_plugins() -> Mapping[str, EntryPoint]:
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

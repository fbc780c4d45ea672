"""Finds runtime plugins through the entry-point group `qvm.runtimes`; the core knows none by name.

A plugin that fails to import or is no `Runtime` spoils only itself: `list_runtimes` shows why, the others work.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.metadata import EntryPoint

from qvm.config.plugins import find_plugins
from qvm.errors import HostError, UsageError
from qvm.log import get_logger
from qvm.runtime.base import Runtime

log = get_logger(__name__)


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
    found = find_plugins()
    entry = found.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(found))}"
        raise UsageError(f"there is no runtime {name!r}", hint=hint)
    return _load(entry)


def list_runtimes() -> list[RuntimeInfo]:
    """All installed plugins, sorted by name; broken ones with the reason."""
    infos = []
    for name, entry in sorted(find_plugins().items()):
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

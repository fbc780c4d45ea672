"""The guest's agent as one file: the modules of `cloud-init/agent/` one after another, what each imports before it.

Guests get a single file of Python (baked into an image, written by a seed, sent over the agent's own channel), and its
digest tells versions apart: the same modules give the same bytes everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qvm import paths

ENTRY = "main"
_HEADER = "# qvm's guest agent, joined from the modules of cloud-init/agent by qvm/agentbundle.py.\n"
_SIBLING = re.compile(r"^from \.(\w+) import (?:\([^)]*\)|[^(\n]*)\n", re.MULTILINE)


def join_modules(sources: Mapping[str, str], entry: str = ENTRY) -> str:
    """One module out of those that `entry` needs. Pure; `sources` has them by name, and they import each other at the
    top, by `from .name import ...`. ValueError for a circle; KeyError for a module that is not there.
    """
    done: dict[str, str] = {}

    def add(name: str, importers: tuple[str, ...]) -> None:
        if name in importers:
            raise ValueError(f"modules import each other in a circle: {' -> '.join((*importers, name))}")
        if name in done:
            return
        for needed in _SIBLING.findall(sources[name]):
            add(needed, (*importers, name))
        done[name] = _SIBLING.sub("", sources[name]).strip("\n")

    add(entry, ())
    return _HEADER + "".join(f"\n\n# --- {name} ---\n\n{text}\n" for name, text in done.items())


def agent_source() -> bytes:
    """The agent of this qvm."""
    folder = paths.share_dir("cloud-init") / "agent"
    return join_modules({path.stem: path.read_text() for path in sorted(folder.glob("*.py"))}).encode()

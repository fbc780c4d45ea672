"""The guest's agent as a module of this process: joined as it is for guests."""

from __future__ import annotations

import linecache
from types import ModuleType
from typing import Any

from qvm.agentbundle import agent_source


def load_agent() -> Any:
    """A module of its own each time."""
    source, name = agent_source().decode(), "<the joined agent>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for failures' excerpts
    module = ModuleType("agent")
    exec(compile(source, name, "exec"), module.__dict__)
    return module

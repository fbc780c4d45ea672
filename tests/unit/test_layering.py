"""The floors of the house: imports go downward only (see ARCHITECTURE.md). Read from the source alone."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# From the ground up; rooms of one floor never import each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("units", "arch", "paths", "filenames", "log", "logtail", "progress", "wait", "execresult", "agentbundle"),
    ("locks",),
    ("process",),
    ("config",),
    ("instance",),
    ("image", "seed", "qemu", "guest"),
    ("runtime",),
    ("warm",),
    ("supervisor",),
    ("commands",),
    ("cli", "api"),
    ("__main__", "__init__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# Files of the ground floor that build on each other, which the floors above cannot say.
SIDEWAYS = {("filenames", "paths"), ("agentbundle", "paths")}

PLUGIN_MAY = ("qvm.runtime", "qvm.errors", "qvm.execresult")
"""What a runtime plugin imports of qvm, as a third party's would."""


def python_files(folder: str) -> list[Path]:
    return sorted((REPOSITORY / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, wherever in it; relative names are resolved."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(REPOSITORY).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from qvm import paths` imports the module qvm.paths.
            yield from ((node.lineno, f"{module}.{alias.name}" if module == "qvm" else module) for alias in node.names)


def room(path: Path) -> str:
    return path.relative_to(REPOSITORY / "qvm").with_suffix("").parts[0]


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in python_files("qvm")} <= set(FLOOR)


@pytest.mark.parametrize("path", python_files("qvm"), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_go_downward(path: Path) -> None:
    here = room(path)
    wrong = []
    for line, name in imports(path):
        first, _, rest = name.partition(".")
        there = rest.partition(".")[0]
        if first != "qvm" or there == here or there not in FLOOR or (here, there) in SIDEWAYS:
            continue
        if FLOOR[there] >= FLOOR[here]:
            wrong.append(f"{path.relative_to(REPOSITORY)}:{line} imports {name}")
    assert wrong == []


def test_the_core_knows_no_runtime_by_name() -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {name}"
        for path in python_files("qvm")
        for line, name in imports(path)
        if name.partition(".")[0] in ("runtimes", "qvm_runtimes")
    ]
    assert wrong == []


def test_plugins_import_only_what_a_third_party_may() -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {name}"
        for path in python_files("runtimes")
        for line, name in imports(path)
        if name.partition(".")[0] == "qvm" and not any(name == may or name.startswith(may + ".") for may in PLUGIN_MAY)
    ]
    assert wrong == []


def test_what_runs_in_the_guest_needs_the_standard_library_alone() -> None:
    # Hash modules that come and go between versions of Python; the other names are those of this one.
    standard = {*sys.stdlib_module_names, "__future__", "_sha2", "_sha256"}
    wrong = [
        f"{path.relative_to(REPOSITORY)}:{line} imports {name}"
        for path in python_files("cloud-init")
        for line, name in imports(path)
        if name.partition(".")[0] not in standard and not name.startswith("cloud-init.agent.")  # its own modules
    ]
    assert wrong == []


def test_every_room_is_in_the_wheel() -> None:
    """A checkout works without; an installation does not."""
    packages = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in python_files("qvm")}
    plugins = {"qvm_" + ".".join(path.parent.relative_to(REPOSITORY).parts) for path in python_files("runtimes")}
    assert folders | plugins <= set(packages)

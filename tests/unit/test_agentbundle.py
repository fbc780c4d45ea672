"""The agent's modules become one file."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from qvm.agentbundle import agent_source, join_modules

FOLDER = Path(__file__).resolve().parents[2] / "cloud-init" / "agent"


def test_each_module_comes_once_and_after_what_it_imports() -> None:
    joined = join_modules({
        "main": "import sys\nfrom .b import (\n    two,\n    three,\n)\nfrom .a import one\n\nprint(one + two + three)",
        "a": '"""A."""\n\nfrom .c import zero\n\none = zero + 1\n',
        "b": "from .c import zero\n\ntwo, three = zero + 2, 3\n",
        "c": "zero = 0\n",
        "unused": "print('never')\n",
    })
    assert [line for line in joined.splitlines() if line.startswith("# --- ")] == [
        "# --- c ---", "# --- b ---", "# --- a ---", "# --- main ---"]
    assert "from ." not in joined
    assert "never" not in joined
    done = subprocess.run([sys.executable, "-I", "-c", joined], capture_output=True, text=True, check=True)
    assert done.stdout == "6\n"


def test_a_circle_is_named() -> None:
    with pytest.raises(ValueError, match="main -> a -> main"):
        join_modules({"main": "from .a import x\n", "a": "from .main import y\n"})
    with pytest.raises(KeyError, match="absent"):
        join_modules({"main": "from .absent import x\n"})


def test_the_same_bytes_everywhere() -> None:
    """The image's key and the warm images' depend on them."""
    code = "import sys; from qvm.agentbundle import agent_source; sys.stdout.buffer.write(agent_source())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C"})
    assert other.stdout == agent_source()


def _bound(tree: ast.Module) -> list[tuple[str, str]]:
    """(name, what binds it) at the top of a module, but for what comes from its siblings."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            if not (isinstance(node, ast.ImportFrom) and node.level):
                found += [(alias.asname or alias.name, ast.unparse(node)) for alias in node.names]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append((node.name, f"line {node.lineno}"))
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            names = [leaf for leaf in ast.walk(node) if isinstance(leaf, ast.Name) and isinstance(leaf.ctx, ast.Store)]
            found += [(name.id, f"line {node.lineno}") for name in names]
    return found


def test_modules_do_not_meet_in_their_common_name_space() -> None:
    """Two modules may import the same thing by the same name; nothing else may be defined twice."""
    binders = defaultdict(set)
    for path in sorted(FOLDER.glob("*.py")):
        for name, what in _bound(ast.parse(path.read_text())):
            binders[name].add(what if what.startswith(("import", "from")) else f"{path.name} {what}")
    assert {name: sorted(what) for name, what in binders.items() if len(what) > 1} == {}


def test_siblings_are_imported_only_where_the_joiner_sees_it() -> None:
    """At the top and by name: `from .x import a as b` and an import inside a function would be lost."""
    names = {path.stem for path in FOLDER.glob("*.py")}
    wrong = []
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                plain = all(alias.asname is None and alias.name != "*" for alias in node.names)
                if node not in tree.body or not plain or node.level != 1 or node.module not in names:
                    wrong.append(f"{path.name}:{node.lineno}")
    assert wrong == []


def test_every_module_is_part_of_the_agent() -> None:
    joined = agent_source().decode()
    assert {path.stem for path in FOLDER.glob("*.py")} == {
        line.split()[2] for line in joined.splitlines() if line.startswith("# --- ")}


def test_it_compiles_for_the_oldest_python_that_a_guest_may_have() -> None:
    ast.parse(agent_source(), feature_version=(3, 9))


def test_it_loads_nothing_that_an_emulated_boot_would_wait_for() -> None:
    code = """import sys
exec(compile(sys.stdin.read(), "agent", "exec"), {"__name__": "agent"})
print(*sys.modules)
"""
    argv = [sys.executable, "-I", "-S", "-c", code]
    loaded = set(subprocess.run(argv, input=agent_source(), capture_output=True, check=True).stdout.decode().split())
    assert "_socket" in loaded
    assert not loaded & {"collections", "ctypes", "hashlib", "json", "pathlib", "re", "socket", "struct", "subprocess",
                         "threading", "typing"}

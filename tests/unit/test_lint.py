"""Linters as tests, and the rules of the house that no linter knows."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("qvm", "runtimes", "cloud-init", "images", "benchmarks", "tests", "scripts", ".ci")

MOST_LINES = 400
MOST_FUNCTION_LINES = 60

# The only door to other programs is qvm/process.py. Whoever else may open one is named here, with the reason.
MAY_START_PROGRAMS = {"qvm/process.py": "it is the door"}

# Who may end the process: entry points.
MAY_EXIT = {"qvm/__main__.py", "qvm/supervisor/__main__.py"}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def shell_files() -> list[Path]:
    """Everything that a POSIX shell or bash runs."""
    return sorted(
        path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and path.suffix != ".py" and _is_shell(path)
    )


def _is_shell(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline(100)
    return path.suffix == ".sh" or (first.startswith(b"#!") and first.strip().endswith((b"/sh", b" sh", b"bash")))


def run(*argv: str) -> None:
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(argv[:4])}\n{done.stdout}{done.stderr}", pytrace=False)


def test_ruff() -> None:
    run(sys.executable, "-m", "ruff", "check", ".")


def test_types() -> None:
    run(sys.executable, "-m", "mypy")


def test_shellcheck() -> None:
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is missing: apt-get install shellcheck (make test does it)")
    files = [name_of(path) for path in shell_files()]
    assert ".ci/run" in files
    # shellcheck asks that busybox's shell be called dash, its nearest relative.
    ash = [name for name in files if b"busybox" in (REPOSITORY / name).read_bytes().partition(b"\n")[0]]
    run(program, *(name for name in files if name not in ash))
    if ash:
        run(program, "--shell=dash", *ash)


def test_files_stay_readable() -> None:
    long = {
        name_of(path): lines
        for path in python_files("qvm", "runtimes", "cloud-init", "benchmarks", "tests")
        if (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert long == {}


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_stay_readable() -> None:
    long = [
        f"{name_of(path)}:{function.lineno} {function.name}: {lines} lines"
        for path in python_files("qvm", "runtimes", "cloud-init", "benchmarks", "tests")
        for function in functions(path)
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > MOST_FUNCTION_LINES
    ]
    assert long == []


def test_no_error_is_swallowed() -> None:
    """`pass` in an `except` needs a narrow error and the reason beside it."""
    swallowed = []
    for path in python_files("qvm", "runtimes", "cloud-init"):
        text = path.read_text()
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ExceptHandler) and isinstance(node.body[0], ast.Pass):
                broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                if broad or "#" not in lines[node.body[0].lineno - 1]:
                    swallowed.append(f"{name_of(path)}:{node.lineno}")
    assert swallowed == []


def _type_checking_lines(tree: ast.Module) -> set[int]:
    """Lines below `if TYPE_CHECKING:`, which never run."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


_STARTERS = {
    "os": ("system", "popen", "fork", "forkpty", "posix_spawn", "execv", "execve", "execvp", "execvpe", "spawnv"),
    "asyncio": ("create_subprocess_exec", "create_subprocess_shell"),
}


def starts_programs(path: Path) -> Iterator[int]:
    """Lines that could start another program."""
    tree = ast.parse(path.read_text())
    never_run = _type_checking_lines(tree)
    for node in ast.walk(tree):
        found = False
        if isinstance(node, ast.Import):
            found = any(alias.name.partition(".")[0] in ("subprocess", "pty") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found = node.module in ("subprocess", "pty")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found = node.attr in _STARTERS.get(node.value.id, ())
        if found and node.lineno not in never_run:
            yield node.lineno


def test_one_door_to_other_programs() -> None:
    doors = [
        f"{name_of(path)}:{line}"
        for path in python_files("qvm", "runtimes")
        if name_of(path) not in MAY_START_PROGRAMS
        for line in starts_programs(path)
    ]
    assert doors == []


def test_library_code_neither_exits_nor_prints() -> None:
    wrong = []
    for path in python_files("qvm", "runtimes"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            prints = isinstance(called, ast.Name) and called.id in ("print", "exit", "quit")
            leaves = isinstance(node, ast.Attribute) and node.attr in ("exit", "_exit") and (
                isinstance(node.value, ast.Name) and node.value.id in ("sys", "os")
            )
            raises = isinstance(node, ast.Name) and node.id == "SystemExit"
            if prints or ((leaves or raises) and name_of(path) not in MAY_EXIT):
                wrong.append(f"{name_of(path)}:{getattr(node, 'lineno', '?')}")
    assert wrong == []


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by bare name; two of one name would shadow each other."""
    names = [path.name for path in python_files("tests") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))

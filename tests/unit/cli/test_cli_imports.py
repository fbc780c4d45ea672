"""Start-up is a feature: what the fast verbs import, measured in names rather than in a machine's milliseconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "asyncio", "cryptography", "importlib.metadata", "paramiko", "psutil", "pycdlib", "qemu", "requests", "rich",
    "yaml", "logging",
}  # fmt: skip

SCRIPT = """
import sys
from qvm.cli.main import run
code = run(sys.argv[1:])
print("|".join(sorted(sys.modules)), code)
"""


def loaded_by(*argv: str, home: Path) -> tuple[set[str], int]:
    """Modules that a command line loads, and its exit code."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *argv], capture_output=True, text=True, check=True,
        env={**os.environ, "QVM_HOME": str(home)},
    )  # fmt: skip
    names, _, code = done.stdout.splitlines()[-1].rpartition(" ")
    return set(names.split("|")), int(code)


def loaded_by_python() -> set[str]:
    """What Python loads for itself here (an editable install brings a finder): not ours."""
    argv = [sys.executable, "-c", "import sys; print('|'.join(sys.modules))"]
    return set(subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip().split("|"))


@pytest.mark.parametrize(
    ("argv", "code"), [(("--help",), 0), (("status",), 3), (("list",), 0), (("list", "--json"), 0), (("ssh",), 3)]
)
def test_fast_verbs_load_nothing_heavy(tmp_path: Path, argv: tuple[str, ...], code: int) -> None:
    modules, exit_code = loaded_by(*argv, home=tmp_path)
    assert exit_code == code
    assert (modules - loaded_by_python()) & HEAVY == set()


def test_help_loads_no_verb(tmp_path: Path) -> None:
    modules, _ = loaded_by("--help", home=tmp_path)
    assert not {name for name in modules if name.startswith(("qvm.commands", "qvm.cli.life", "qvm.cli.show"))}

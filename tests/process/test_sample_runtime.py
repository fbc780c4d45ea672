"""A third party's runtime, installed with pip as its users would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLE = REPOSITORY / "tests" / "sample-runtime"
LIST = """
import json
from qvm.runtime.registry import list_runtimes, load_runtime
runtime = load_runtime("httpd")
print(json.dumps([[info.name, info.error] for info in list_runtimes()]))
print(json.dumps([type(runtime).__module__, runtime.summary, [socket.name for socket in runtime.sockets]]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to put on the path, as `pip install` leaves it."""
    copy = tmp_path_factory.mktemp("source") / "sample"  # the build writes beside its source
    subprocess.run(["cp", "-r", SAMPLE, copy], check=True)
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, copy],
        check=True, capture_output=True, timeout=300,
    )
    return folder


def run(installed: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    path = f"{installed}:{REPOSITORY}"
    return subprocess.run([sys.executable, *argv], check=False, capture_output=True, text=True, timeout=60,
                          env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": str(installed)})


def test_it_is_a_runtime_like_ours(installed: Path) -> None:
    done = run(installed, "-c", LIST)
    assert done.returncode == 0, done.stderr
    names, plugin = map(json.loads, done.stdout.splitlines())
    assert ["httpd", None] in names and ["docker", None] in names
    assert plugin == ["qvm_sample_httpd", "busybox's web server", ["httpd"]]


def test_the_command_line_knows_it(installed: Path) -> None:
    done = run(installed, "-m", "qvm", "start", "x", "--runtime", "httpt")
    assert done.returncode == 2 and "did you mean httpd" in done.stderr
    gone = run(Path("/nonexistent"), "-m", "qvm", "start", "x", "--runtime", "httpd")
    assert gone.returncode == 2 and "there is no runtime 'httpd'" in gone.stderr


def test_it_imports_only_what_a_plugin_may() -> None:
    import ast

    tree = ast.parse((SAMPLE / "qvm_sample_httpd" / "__init__.py").read_text())
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in modules if name.partition(".")[0] == "qvm"}
    assert ours == {"qvm.runtime.base", "qvm.runtime.services"}

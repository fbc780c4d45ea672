"""`qvm nerdctl` beyond running it: the alias on the host, and the logins that go along."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from base64 import b64encode
from pathlib import Path

import pytest

from qvm.cli.main import run
from qvm.commands.credentials import find_registries, lend, read_logins
from qvm.errors import HostError

HELPER = """#!/bin/sh
case $1 in
list) echo '{"a.example:5000": "ann", "https://index.docker.io/v1/": "hub", "b.example": "x"}' ;;
get) read -r server; echo "$server" >>"$QVM_TEST_ASKED"
    case $server in
    b.example) echo "not found" >&2; exit 1 ;;
    https*) echo '{"Username": "<token>", "Secret": "t"}' ;;
    *) echo '{"Username": "ann", "Secret": "pw"}' ;;
    esac ;;
esac
"""
ANN = {"auth": b64encode(b"ann:pw").decode()}


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "docker-credential-mine").write_text(HELPER)
    (tools / "docker-credential-mine").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("QVM_TEST_ASKED", str(tmp_path / "asked"))
    (tmp_path / "docker").mkdir()
    return {"DOCKER_CONFIG": str(tmp_path / "docker")}


def write(environ: dict[str, str], **config: object) -> None:
    (Path(environ["DOCKER_CONFIG"]) / "config.json").write_text(json.dumps(config))


def test_logins_of_the_file_and_of_helpers(environ: dict[str, str]) -> None:
    write(environ, auths={"c.example": {"auth": "eDp5"}, "a.example:5000": {}}, credsStore="mine")
    assert read_logins(environ) == {
        "c.example": {"auth": "eDp5"}, "a.example:5000": ANN, "https://index.docker.io/v1/": {"identitytoken": "t"},
    }


def test_helpers_are_asked_only_for_what_is_named(environ: dict[str, str], tmp_path: Path) -> None:
    write(environ, credsStore="mine")
    assert read_logins(environ, ["pull", "a.example:5000/x/y"]) == {"a.example:5000": ANN}
    assert (tmp_path / "asked").read_text() == "a.example:5000\n"
    assert find_registries(["run", "-v", "/a:/b", "./x.y/z", "busybox", "localhost/q"]) == {"localhost"}
    assert find_registries(["build", "-t", "a.example/x", "."]) == set()


def test_without_logins_or_need_of_them_nothing_is_added(environ: dict[str, str], tmp_path: Path) -> None:
    prefix = ("sudo", "nerdctl")
    for argv in (["ps"], ["login", "x"], ["pull", "x"]):
        assert lend(argv, prefix, "DOCKER_CONFIG={folder}", tmp_path / "none", environ) == [*prefix, *argv]
    (Path(environ["DOCKER_CONFIG"]) / "config.json").write_text("{ broken")
    assert read_logins(environ) == {}
    write(environ, credsStore="gone")
    assert read_logins(environ) == {}


def test_the_alias_is_ours_to_replace_and_nobody_elses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x" / "nerdctl"
    assert run(["-p", "dev", "nerdctl", "install", "--path", str(path)]) == 0
    assert run(["nerdctl", "install", f"--path={path}"]) == 0
    assert str(path) in capsys.readouterr().out
    assert path.stat().st_mode & stat.S_IXUSR
    env = {**os.environ, "QVM_HOME": str(tmp_path)}
    shown = subprocess.run([path, "ps"], capture_output=True, text=True, env=env, check=False)
    assert "there is no instance 'default'" in shown.stderr + shown.stdout
    path.write_text("#!/bin/sh\necho somebody else\n")
    assert run(["nerdctl", "install", "--path", str(path)]) == HostError.exit_code
    assert "is not qvm's" in capsys.readouterr().err and "somebody" in path.read_text()
    assert run(["nerdctl", "install", "--path", str(path), "--force"]) == 0
    assert run(["nerdctl", "install", "--nope"]) == 2


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    from qvm.commands.alias import install_alias

    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="cannot write"):
        install_alias("nerdctl", "dev", path=tmp_path / "file" / "nerdctl")

"""docker contexts made by the docker runtime, read back by the real docker CLI (no engine is needed for that)."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from qvm.process import find_program
from qvm.runtime.base import RuntimeContext
from runtimes.docker import Docker

USER_CONFIG = '{\n\t"auths": {},\n\t"detachKeys": "ctrl-e,e",\n\t"psFormat": "x"\n}'


class Host:
    """A home folder with a docker configuration and instances of qvm."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.docker = home / ".docker"
        self.config = self.docker / "config.json"
        self.env = {"HOME": str(home)}

    def context(self, profile: str, **env: str) -> RuntimeContext:
        folder = self.home / ".qvm" / profile
        return RuntimeContext(
            profile=profile, folder=folder, state_folder=self.home / ".qvm" / "_instances" / profile / "runtime",
            user="ann", env={**self.env, **env},
        )

    def start(self, profile: str, *, switch: bool = True, **env: str) -> list[str]:
        return Docker().activate(self.context(profile, **env), switch=switch)

    def stop(self, profile: str, *, remove: bool = False, **env: str) -> list[str]:
        return Docker().deactivate(self.context(profile, **env), remove=remove)

    @property
    def current(self) -> str:
        if not self.config.exists():
            return "default"
        return str(json.loads(self.config.read_text()).get("currentContext", "default"))

    def cli(self, *words: str) -> str:
        program = find_program("docker")
        if program is None:
            pytest.skip("needs the docker CLI: apt-get install docker-cli, or a static docker binary on PATH")
        env = {key: value for key, value in os.environ.items() if not key.startswith("DOCKER")}
        done = subprocess.run([program, *words], env={**env, "HOME": str(self.home)}, capture_output=True, text=True,
                              check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def listed(self) -> dict[str, dict[str, Any]]:
        lines = self.cli("context", "ls", "--format", "json").splitlines()
        return {entry["Name"]: entry for entry in map(json.loads, lines)}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_the_docker_cli_sees_the_context_as_current(host: Host) -> None:
    assert host.start("dev") == []
    entry = host.listed()["qvm-dev"]
    assert entry["Current"] and not entry["Error"]
    assert entry["DockerEndpoint"] == f"unix://{host.home}/.qvm/dev/docker.sock"
    assert host.cli("context", "show").strip() == "qvm-dev"
    inspected = json.loads(host.cli("context", "inspect", "qvm-dev"))[0]
    assert inspected["Endpoints"] == {
        "docker": {"Host": f"unix://{host.home}/.qvm/dev/docker.sock", "SkipTLSVerify": False}
    }
    host.stop("dev")
    assert host.cli("context", "show").strip() == "default"
    assert not host.listed()["qvm-dev"]["Current"], "a stopped instance's context stays, not current"
    host.stop("dev", remove=True)
    assert set(host.listed()) == {"default"}


def test_our_file_is_the_one_the_docker_cli_writes(host: Host) -> None:
    host.start("dev", switch=False)
    ours = next((host.docker / "contexts" / "meta").glob("*/meta.json"))
    made = ours.read_text()
    where = ours.relative_to(host.docker)
    host.stop("dev", remove=True)
    endpoint = f"host=unix://{host.home}/.qvm/dev/docker.sock"
    host.cli("context", "create", "qvm-dev", "--description", "qvm: the instance 'dev'", "--docker", endpoint)
    theirs = json.loads((host.docker / where).read_text())
    assert json.loads(made) == theirs


def test_the_default_profile_is_called_qvm(host: Host) -> None:
    host.start("default")
    assert host.current == "qvm"


def test_what_the_docker_cli_does_to_the_context_keeps_what_we_remember(host: Host) -> None:
    host.cli("context", "create", "mine", "--docker", "host=unix:///nowhere.sock")
    host.cli("context", "use", "mine")
    host.start("dev")
    host.cli("context", "update", "qvm-dev", "--description", "renamed by the user")
    host.stop("dev")
    assert host.cli("context", "show").strip() == "mine"
    assert host.listed()["qvm-dev"]["Description"] == "renamed by the user"


@pytest.mark.parametrize(
    "original", [USER_CONFIG, USER_CONFIG + "\n", '{"auths":{}}', "{}", USER_CONFIG.replace("\n", "\r\n")]
)
@pytest.mark.parametrize(
    "steps",  # + start, - stop, x delete
    ["+a -a", "+a +b -b -a", "+a +b -a -b", "+a +b +c -b -a -c", "+a +b +c -a -c -b", "+a +a -a", "+a +b xa -b",
     "+a +b -a xa -b xb", "+a -a +b +a -b -a", "+a +b -a +a -b -a"],
)
def test_stops_in_any_order_end_where_the_user_began(host: Host, steps: str, original: str) -> None:
    host.docker.mkdir()
    host.config.write_bytes(original.encode())
    for step in steps.split():
        action, profile = step[0], step[1:]
        notes = host.start(profile) if action == "+" else host.stop(profile, remove=action == "x")
        assert notes == []
        if action == "+":
            assert host.current == f"qvm-{profile}"
    assert host.config.read_bytes() == original.encode()


def test_a_running_one_is_current_again_when_the_later_one_stops(host: Host) -> None:
    host.start("a")
    host.start("b")
    host.stop("b")
    assert host.current == "qvm-a"


def test_a_context_the_user_chose_meanwhile_stays(host: Host) -> None:
    host.start("dev")
    host.cli("context", "use", "default")
    host.cli("context", "create", "mine", "--docker", "host=unix:///nowhere.sock")
    host.cli("context", "use", "mine")
    host.stop("dev", remove=True)
    assert host.cli("context", "show").strip() == "mine"


def test_a_previous_context_that_is_gone_falls_back_to_the_default(host: Host) -> None:
    host.cli("context", "create", "mine", "--docker", "host=unix:///nowhere.sock")
    host.cli("context", "use", "mine")
    host.start("dev")
    host.cli("context", "rm", "mine")
    host.stop("dev")
    assert host.cli("context", "show").strip() == "default"


def test_without_switch_nothing_becomes_current(host: Host) -> None:
    host.docker.mkdir()
    host.config.write_text(USER_CONFIG)
    host.start("dev", switch=False)
    assert host.config.read_text() == USER_CONFIG
    assert "qvm-dev" in host.listed()
    host.cli("context", "use", "qvm-dev")
    host.stop("dev")
    assert host.current == "qvm-dev", "what the user made current stays, though it does not answer"
    host.stop("dev", remove=True)
    assert host.current == "default", "but never a context that is gone"


def test_a_context_of_that_name_which_is_not_ours_is_left_alone(host: Host) -> None:
    host.cli("context", "create", "qvm-dev", "--docker", "host=tcp://elsewhere:2375")
    before = {path: path.read_bytes() for path in host.docker.rglob("*") if path.is_file()}
    notes = host.start("dev")
    assert len(notes) == 1 and "tcp://elsewhere:2375" in notes[0] and "DOCKER_HOST=unix://" in notes[0]
    assert host.stop("dev", remove=True) == []
    assert {path: path.read_bytes() for path in host.docker.rglob("*") if path.is_file()} == before


def test_symlink_and_mode_of_the_users_file_are_kept(host: Host) -> None:
    target = host.home / "dotfiles" / "docker.json"
    target.parent.mkdir()
    target.write_text(USER_CONFIG)
    target.chmod(0o640)
    host.docker.mkdir()
    host.config.symlink_to(target)
    host.start("dev")
    assert host.config.is_symlink() and "qvm-dev" in target.read_text()
    assert target.stat().st_mode & 0o777 == 0o640
    host.stop("dev")
    assert target.read_text() == USER_CONFIG and list(target.parent.iterdir()) == [target]


def test_a_damaged_file_is_a_note_and_stays_as_it_is(host: Host) -> None:
    host.docker.mkdir()
    host.config.write_text('{"auths": ')
    notes = host.start("dev")
    assert (len(notes) == 1 and "config.json" in notes[0]) or "configuration" in notes[0]
    assert host.config.read_text() == '{"auths": '
    assert host.stop("dev") == []


def test_docker_config_of_the_start_is_mended_by_a_stop_without_it(host: Host, tmp_path: Path) -> None:
    elsewhere = tmp_path / "else where"
    host.start("dev", DOCKER_CONFIG=str(elsewhere))
    assert json.loads((elsewhere / "config.json").read_text())["currentContext"] == "qvm-dev"
    host.stop("dev")
    assert "currentContext" not in json.loads((elsewhere / "config.json").read_text())


def test_variables_that_override_the_context_are_named(host: Host) -> None:
    notes = host.start("dev", DOCKER_HOST="tcp://x:1", DOCKER_CONTEXT="other")
    assert [note.split()[0] for note in notes] == ["DOCKER_HOST", "DOCKER_CONTEXT"]


def test_a_stop_of_what_was_never_started_makes_nothing(host: Host) -> None:
    assert host.stop("dev", remove=True) == []
    assert not host.docker.exists()


def test_many_at_once_lose_nothing(host: Host) -> None:
    host.docker.mkdir()
    host.config.write_text(USER_CONFIG)
    names = [f"p{number}" for number in range(8)]
    for action in (host.start, host.stop):
        threads = [threading.Thread(target=action, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert host.config.read_text() == USER_CONFIG
    assert len(list((host.docker / "contexts" / "meta").iterdir())) == len(names)

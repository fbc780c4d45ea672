"""Bad input and poor hosts, through the real program: a clear error with the mending command, the right exit code,
nothing made. No VM is booted: each fails before that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

QVM = Path(sys.executable).with_name("qvm")


@dataclass
class Host:
    home: Path
    env: dict[str, str]

    def qvm(self, *argv: str, **changed: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([QVM, *argv], env=self.env | changed, cwd=self.home / "work", capture_output=True,
                              text=True, timeout=120, check=False)

    def made(self) -> list[str]:
        """Instances and sockets that exist; caches and locks do not count."""
        instances = self.home / "q" / "_instances"
        return [path.name for path in instances.iterdir() if path.is_dir()] if instances.is_dir() else []


@pytest.fixture
def host() -> Iterator[Host]:
    with TemporaryDirectory(prefix="qvmf", dir="/tmp") as folder:
        home = Path(folder)
        (home / "work").mkdir()
        env = {key: value for key, value in os.environ.items() if not key.startswith(("QVM_", "DOCKER_"))}
        env |= {"HOME": folder, "QVM_HOME": f"{folder}/q", "QVM_CACHE_HOME": f"{folder}/c"}
        yield Host(home, env)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["start", "--cpus", "0"], ["--cpus", "0"]),
        (["start", "--memory", "10TiB"], ["memory"]),
        (["start", "--cpsu", "2"], ["--cpsu", "--cpus"]),
        (["start", "--mount", "./missing"], ["missing"]),
        (["start", "--mount", ".:/"], ["/"]),
        (["start", "Bad_Name!"], ["Bad_Name!"]),
        (["start", "--runtime", "dokcer"], ["dokcer", "docker"]),
        (["start", "one", "--profile", "two"], ["one", "two"]),
        (["start", "--arch", "sparc64"], ["sparc64"]),
        (["strat"], ["start"]),
    ],
)
def test_bad_words_are_usage_errors(host: Host, argv: list[str], words: list[str]) -> None:
    done = host.qvm(*argv)
    assert done.returncode == 2, done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr
    assert host.made() == []


def test_all_problems_of_a_profile_file_are_told_with_their_places(host: Host) -> None:
    folder = host.home / "q" / "default"
    folder.mkdir(parents=True)
    (folder / "qvm.yaml").write_text("cpus: 2\nmemroy: 4\ndisk: tiny\n")
    done = host.qvm("start", "--json")
    assert done.returncode == 2
    error = json.loads(done.stdout or done.stderr)["error"]
    text = f"{error['message']}\n{error['details']}"
    assert "qvm.yaml:2:1" in text and "memory" in text
    assert "qvm.yaml:3:" in text
    assert host.made() == []


def test_missing_qemu_names_the_package(host: Host) -> None:
    done = host.qvm("start", QVM_QEMU=str(host.home / "nowhere"))
    assert done.returncode == 4
    assert "hint:" in done.stderr
    assert host.made() == []


def test_old_qemu_is_refused(host: Host) -> None:
    old = host.home / "qemu-system-x86_64"
    old.write_text("#!/bin/sh\necho 'QEMU emulator version 5.2.0'\n"
                   """printf '{"QMP": {"version": {"qemu": {"major": 5, "minor": 2, "micro": 0}, "package": ""},"""
                   """ "capabilities": []}}\\n'\nsleep 5\n""")
    old.chmod(0o755)
    (host.home / "qemu-system-aarch64").symlink_to(old)
    done = host.qvm("start", QVM_QEMU=str(host.home))
    assert done.returncode in (1, 4), done.stderr
    assert "5.2" in done.stderr and "hint:" in done.stderr, done.stderr
    assert host.made() == []


def test_socket_path_too_long(host: Host) -> None:
    done = host.qvm("start", QVM_HOME=str(host.home / ("long" * 25)))
    assert done.returncode == 4
    assert "socket path" in done.stderr and "QVM_HOME" in done.stderr


def test_home_that_cannot_be_written(host: Host) -> None:
    (host.home / "file").write_text("")
    done = host.qvm("start", QVM_HOME=str(host.home / "file" / "q"))
    assert done.returncode == 4
    assert "cannot write" in done.stderr and "QVM_HOME" in done.stderr


def test_unreachable_mirror_is_told_with_the_variable(host: Host) -> None:
    done = host.qvm("image", "build", "debian-13", QVM_DEBIAN_MIRROR="http://127.0.0.1:9/debian")
    assert done.returncode == 1, done.stderr
    assert "QVM_DEBIAN_MIRROR" in done.stderr
    assert not list((host.home / "c" / "images").glob("*/manifest.json"))


def test_no_space_for_the_image(host: Host) -> None:
    """A cache of 64 MiB, in a mount namespace of the test's own."""
    script = 'mount -t tmpfs -o size=64m none "$QVM_CACHE_HOME" && exec "$0" image build debian-13'
    (host.home / "c").mkdir()
    enter = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    done = subprocess.run([*enter, "sh", "-c", script, str(QVM)], env=host.env, cwd=host.home, capture_output=True,
                          text=True, timeout=120, check=False)
    assert done.returncode == 4, done.stderr
    assert "free" in done.stderr and "hint:" in done.stderr
    assert not list((host.home / "c").glob("images/*/manifest.json"))


def test_verbs_of_an_instance_that_is_not_there(host: Host) -> None:
    for argv in (["stop"], ["status"], ["restart"], ["ssh", "--", "true"], ["logs"], ["ssh-config"], ["delete", "-f"],
                 ["nerdctl", "ps"]):
        done = host.qvm(*argv)
        assert done.returncode == 3, (argv, done.stderr)
    assert host.qvm("list").returncode == 0

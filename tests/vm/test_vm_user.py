"""The whole flow as somebody without root: image built in user namespaces, instance, container, port, mount."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import QVM, REPOSITORY, User, clear, fetch, make_user, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.timeout(2400)]

NAME = "qvmtester"


@dataclass
class Unprivileged(User):
    """The same commands as another account, with qvm installed by that account from its own copy."""

    python: Path = Path()

    def popen(self, *argv: str) -> subprocess.Popen[bytes]:
        words = ["setpriv", f"--reuid={NAME}", f"--regid={NAME}", "--init-groups",
                 str(self.python.with_name("qvm")), *argv]
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                cwd=self.work, env=self.env)

    def run(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        words = list(argv)
        if words[0] == str(QVM):
            words[0] = str(self.python.with_name("qvm"))
        return super().run("setpriv", f"--reuid={NAME}", f"--regid={NAME}", "--init-groups", *words, **options)


@pytest.fixture(scope="module")
def person(cache_home: Path, busybox_tar: Path) -> Iterator[User]:
    if os.getuid() != 0:
        user = make_user(cache_home)
        shutil.copy(busybox_tar, user.work / "busybox.tar")
        yield user
        clear(user)
        return
    if NAME not in {entry.pw_name for entry in pwd.getpwall()}:
        subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", NAME], check=True)
    base = make_user(cache_home)
    home = Path(pwd.getpwnam(NAME).pw_dir)
    cache = home / "cache"
    # What root has built cannot be read by this user and must not be: an own cache; only packages are handed on.
    for kept in ("apt", "tools"):
        if (cache_home / kept).is_dir() and not (cache / kept).exists():
            shutil.copytree(cache_home / kept, cache / kept)
    base.env |= {"QVM_CACHE_HOME": str(cache), "USER": NAME, "LOGNAME": NAME}
    shutil.copy(busybox_tar, base.work / "busybox.tar")
    copy = base.home / "source"
    shutil.copytree(REPOSITORY, copy, ignore=shutil.ignore_patterns(".git", ".venv", "*.egg-info", ".*_cache"))
    subprocess.run(["chown", "-R", f"{NAME}:", base.home, home], check=True)
    user = Unprivileged(base.home, base.work, base.env, base.home / "venv" / "bin" / "python")
    user.run("/usr/bin/python3", "-m", "venv", str(base.home / "venv"))
    user.run(str(user.python), "-m", "pip", "install", "--quiet", str(copy), timeout=600)
    yield user
    clear(user)


def test_interrupted_build_leaves_nothing(person: User) -> None:
    """Ctrl-C while Debian installs: exit code 130, no process of the build left, no image; the next test builds."""
    images = Path(person.env["QVM_CACHE_HOME"]) / "images"
    if list(images.glob("*/manifest.json")):
        person.qvm("image", "rm", "debian-13")
    shutil.rmtree(images / "base", ignore_errors=True)
    build = person.popen("image", "build", "debian-13")
    marker = f"QVM_CACHE_HOME={person.env['QVM_CACHE_HOME']}".encode()
    wait_for(lambda: running("mmdebstrap", marker) or build.poll() is not None, 120, "mmdebstrap at work")
    time.sleep(3)
    for pid in running("image\0build", marker):
        os.kill(pid, signal.SIGINT)
    assert build.wait(60) == 130, build.stderr.read().decode() if build.stderr else ""
    wait_for(lambda: not running("", marker), 15, "nothing of the build runs on")
    assert not list(images.glob("*/manifest.json"))


def running(word: str, marker: bytes) -> list[int]:
    """Processes with `word` in their command line and `marker` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker in (entry / "environ").read_bytes() and (
                word.encode() in (entry / "cmdline").read_bytes()
            ):
                found.append(int(entry.name))
        except OSError:
            continue  # gone meanwhile
    return found


def test_start_run_publish_mount(person: User) -> None:
    person.qvm("start", "--runtime", "docker", timeout=1500)
    assert person.run("id", "-u").stdout.strip() == person.qvm("ssh", "--", "id -u").stdout.strip()
    person.docker("import", str(person.work / "busybox.tar"), "busybox:test")
    person.docker("run", "-d", "-p", "8095:80", "-v", f"{person.work}:/app", "busybox:test",
                  "sh", "-c", "touch /app/made; httpd -f -p 80 -h /www")
    assert wait_for(lambda: fetch(8095), 10, "port 8095") == "hello from a container\n"
    owner = int(person.run("id", "-u").stdout)
    assert (person.work / "made").stat().st_uid == owner
    person.qvm("stop")
    assert person.processes() == []

"""The whole flow as somebody without root: image built in user namespaces, instance, container, port, mount."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
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

"""Real guests. Each test talks to qvm as a user does: the `qvm` program, the docker CLI, sockets on the host.

Instances live in a QVM_HOME of their own under a short path (socket paths are limited to 103 bytes); the image and
package caches are the user's own, so that a second run is fast.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qvm.arch import AARCH64, X86_64, host_arch

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY / "tests" / "tools"
QVM = Path(sys.executable).with_name("qvm")


@dataclass
class User:
    """A person at a terminal: an environment, a working directory, and what they type."""

    home: Path
    work: Path
    env: dict[str, str] = field(default_factory=dict)

    def run(
        self, *argv: str, check: bool = True, timeout: float = 400, cwd: Path | None = None, input: bytes | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            argv, capture_output=True, timeout=timeout, cwd=cwd or self.work, env=self.env, check=False, input=input
        )
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if check and done.returncode != 0:
            pytest.fail(f"{' '.join(argv)}\nexit code {done.returncode}\n--- out\n{out}\n--- err\n{err}")
        return subprocess.CompletedProcess(argv, done.returncode, out, err)

    def qvm(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run(str(QVM), *argv, **options)

    def popen(self, *argv: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [str(QVM), *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            cwd=self.work, env=self.env,
        )

    def docker(self, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run("docker", *argv, **options)

    def status(self, profile: str) -> dict[str, Any]:
        answer = json.loads(self.qvm("status", profile, "--json").stdout)
        assert answer["ok"] is True
        result: dict[str, Any] = answer["result"]
        return result

    def processes(self) -> list[str]:
        """Command lines of everything that still runs for this user's QVM_HOME."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                environ = (entry / "environ").read_bytes()
            except OSError:
                continue
            line = b" ".join(words).decode(errors="replace")
            if self.env["QVM_HOME"] in line or (f"QVM_HOME={self.env['QVM_HOME']}".encode() in environ
                                                and "qvm.supervisor" in line):
                found.append(f"{entry.name} {line[:120]}")
        return found


def wait_for(probe: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true result of `probe`; fails the test when `seconds` pass without one."""
    end = time.monotonic() + seconds
    while True:
        result = probe()
        if result:
            return result
        if time.monotonic() > end:
            pytest.fail(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)


def fetch(port: int, host: str = "localhost") -> str | None:
    """The page at a port of this host, None where nothing answers."""
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/", timeout=20) as page:
            return str(page.read().decode())
    except OSError:
        return None


@pytest.fixture(scope="session")
def cache_home() -> Path:
    explicit = os.environ.get("QVM_CACHE_HOME")
    return Path(explicit) if explicit else Path.home() / ".cache" / "qvm"


def make_user(cache_home: Path) -> User:
    home = Path(tempfile.mkdtemp(prefix="qvmt", dir="/tmp"))
    work = home / "my work"
    work.mkdir()
    env = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("QVM_", "DOCKER_", "PYTEST_"))},
        "HOME": str(home),
        "QVM_HOME": str(home / "q"),
        "QVM_CACHE_HOME": str(cache_home),
        "DOCKER_CONFIG": str(home / "docker"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for name in ("QVM_QEMU", "QVM_DEBIAN_MIRROR", "QVM_MIRROR"):
        if name in os.environ:
            env[name] = os.environ[name]
    plugins = home / "docker" / "cli-plugins"
    plugins.mkdir(parents=True)
    return User(home, work, env)


def clear(user: User) -> None:
    """End and remove what a test left, and insist that nothing stays."""
    for row in json.loads(user.qvm("list", "--json", check=False).stdout or '{"result": []}')["result"]:
        user.qvm("delete", row["profile"], "-f", "--data", check=False)
    left = user.processes()
    shutil.rmtree(user.home, ignore_errors=True)
    assert not left, f"still running: {left}"


@pytest.fixture(scope="module")
def user(cache_home: Path) -> Iterator[User]:
    person = make_user(cache_home)
    yield person
    clear(person)


@pytest.fixture(scope="session")
def busybox_tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A container image's root in a tar: Debian's static busybox, nothing else."""
    root = tmp_path_factory.mktemp("busybox")
    (root / "bin").mkdir()
    (root / "tmp").mkdir()
    busybox = Path("/bin/busybox")
    if not busybox.exists():
        pytest.fail("busybox-static is missing: apt-get install busybox-static (make test does it)")
    shutil.copy(busybox, root / "bin" / "busybox")
    for name in ("sh", "ls", "cat", "echo", "httpd", "uname", "id", "touch", "stat", "sleep", "wget", "nc"):
        (root / "bin" / name).symlink_to("busybox")
    (root / "etc").mkdir()
    (root / "etc" / "passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (root / "www").mkdir()
    (root / "www" / "index.html").write_text("hello from a container\n")
    target = tmp_path_factory.mktemp("images") / "busybox.tar"
    subprocess.run(["tar", "-C", root, "-cf", target, "."], check=True)
    return target


@pytest.fixture(scope="session")
def foreign_busybox(cache_home: Path) -> Path:
    """Static busybox of the other of x86_64 and aarch64, named after Debian's word for it, fetched once."""
    arch = AARCH64 if host_arch() is X86_64 else X86_64
    folder = cache_home / "test-tools" / "busybox"
    subprocess.run([TOOLS / "fetch-busybox.sh", folder, arch.debian], check=True, capture_output=True, timeout=600)
    return folder / f"busybox-{arch.debian}"


@pytest.fixture(scope="session")
def docker_plugins(cache_home: Path) -> Path:
    """compose and buildx for the docker CLI, fetched once into the cache."""
    folder = cache_home / "test-tools" / "docker-plugins"
    subprocess.run([TOOLS / "fetch-docker-plugins.sh", folder], check=True, capture_output=True, timeout=600)
    return folder


@pytest.fixture(scope="session")
def podman_client(cache_home: Path) -> Path:
    """Debian 13's podman client, fetched once into the cache."""
    folder = cache_home / "test-tools" / "podman"
    subprocess.run([TOOLS / "fetch-podman.sh", folder], check=True, capture_output=True, timeout=600)
    return folder / "podman"


def use_plugins(user: User, folder: Path) -> None:
    for plugin in folder.glob("docker-*"):
        link = user.home / "docker" / "cli-plugins" / plugin.name
        if not link.exists():
            link.symlink_to(plugin)


@pytest.fixture(scope="session")
def nginx_tar(cache_home: Path) -> Path:
    """Debian with nginx, by debootstrap, as a tar; kept in the cache."""
    target = cache_home / "test-tools" / "nginx.tar"
    subprocess.run([TOOLS / "make-nginx-tar.sh", target], check=True, capture_output=True, timeout=900)
    return target

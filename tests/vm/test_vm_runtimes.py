"""containerd with a registry and a proxy, its update, and one profile that goes from runtime to runtime and back."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import User, fetch, wait_for
from vm_registry import HOST, PASSWORD, USER, serve_registry

pytestmark = [pytest.mark.vm, pytest.mark.long, pytest.mark.timeout(2400)]

PACKAGE = "runc"
NEWER = "99.0-1~qvmtest"
PAGE = "hello from a container\n"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        """Tests show what matters by themselves."""


@pytest.fixture(scope="module")
def rt(user: User) -> Iterator[tuple[User, str]]:
    with serve_registry(user.home / "registry", login=True) as port:
        registry = f"{HOST}:{port}"
        env = {**user.env, "http_proxy": "http://localhost:9", "no_proxy": "deb.debian.org,example.com"}
        person = User(user.home, user.work, env)
        person.qvm("start", "rt", "--runtime", "containerd", "--disk", "20", "--insecure-registry", registry)
        yield person, registry


def test_a_loopback_proxy_reaches_services_rewritten(rt: tuple[User, str]) -> None:
    user, _ = rt
    said = user.qvm("ssh", "rt", "--", "sudo cat /proc/$(pidof containerd)/environ | tr '\\0' '\\n'").stdout
    assert "http_proxy=http://10.0.2.2:9\n" in said and f"{HOST}" in said
    assert "example.com" in user.qvm("ssh", "rt", "--", "bash -lc 'echo $NO_PROXY'").stdout


def test_nerdctl_builds_and_pushes_with_the_hosts_login(rt: tuple[User, str], busybox_tar: Path) -> None:
    user, registry = rt
    project = user.work / "site"
    project.mkdir()
    subprocess.run(["tar", "-C", project, "-xf", busybox_tar, "./bin/busybox"], check=True)
    (project / "Dockerfile").write_text('FROM scratch\nCOPY bin/busybox /bin/busybox\nENTRYPOINT ["/bin/busybox"]\n')
    image = f"{registry}/team/box:1"
    user.qvm("nerdctl", "-p", "rt", "build", "-t", image, ".", cwd=project)
    refused = user.qvm("nerdctl", "-p", "rt", "push", image, check=False)
    assert refused.returncode != 0 and "no basic auth credentials" in refused.stderr, refused.stderr
    (user.home / "docker" / "config.json").write_text(json.dumps({"auths": {registry: {"auth": b64(USER, PASSWORD)}}}))
    user.qvm("nerdctl", "-p", "rt", "push", image)
    user.qvm("nerdctl", "-p", "rt", "rmi", image)
    assert user.qvm("nerdctl", "-p", "rt", "run", "--rm", image, "echo", "pulled").stdout.strip().endswith("pulled")
    assert user.qvm("ssh", "rt", "--", "sudo sh -c 'ls /run/qvm-clients /root/.docker 2>/dev/null'",
                    check=False).stdout.strip() in ("", "/run/qvm-clients:"), "no login stays in the guest"
    resolved = user.qvm("nerdctl", "-p", "rt", "run", "--rm", image, "nslookup", HOST).stdout
    assert "10.0.2.2" in resolved


def b64(name: str, password: str) -> str:
    from base64 import b64encode

    return b64encode(f"{name}:{password}".encode()).decode()


def test_update_says_what_changed_then_that_nothing_did_then_that_it_is_offline(
    rt: tuple[User, str], tmp_path: Path, cache_home: Path
) -> None:
    user, _ = rt
    make_repository(tmp_path, cache_home)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    source = f"deb [trusted=yes] http://10.0.2.2:{server.server_address[1]} ./"
    user.qvm("ssh", "rt", "--", "sudo sh -c 'mkdir -p /root/kept && mv /etc/apt/sources.list* /root/kept/; "
             f"echo \"{source}\" >/etc/apt/sources.list'")
    try:
        result = json.loads(user.qvm("update", "rt", "--json").stdout)["result"]
        assert result["changed"] is True and len(result["changes"]) == 1
        assert result["changes"][0].startswith(f"{PACKAGE}: 1.") and result["changes"][0].endswith(f"-> {NEWER}")
        assert "is up to date" in user.qvm("update", "rt").stdout
    finally:
        server.shutdown()
        server.server_close()
    failed = user.qvm("update", "rt", check=False)
    assert failed.returncode != 0 and "could not be updated" in failed.stderr and "mirror" in failed.stderr
    user.qvm("ssh", "rt", "--", "sudo sh -c 'rm /etc/apt/sources.list; mv /root/kept/sources.list* /etc/apt/'")


def make_repository(folder: Path, cache_home: Path) -> None:
    """The package as the image's build fetched it, under a higher version: something that really can be installed."""
    asked = subprocess.run(["dpkg", "--print-architecture"], check=True, capture_output=True, text=True)
    machine = asked.stdout.strip()
    [original, *_] = sorted((cache_home / "apt" / machine).glob(f"{PACKAGE}_*.deb"))
    tree = folder / "tree"
    subprocess.run(["dpkg-deb", "-R", original, tree], check=True)
    control = tree / "DEBIAN" / "control"
    lines = [f"Version: {NEWER}" if line.startswith("Version:") else line for line in control.read_text().splitlines()]
    control.write_text("\n".join(lines) + "\n")
    package = folder / f"{PACKAGE}.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "-b", tree, package], check=True, capture_output=True)
    data = package.read_bytes()
    listing = "\n".join([*lines, f"Filename: ./{package.name}", f"Size: {len(data)}",
                         f"SHA256: {hashlib.sha256(data).hexdigest()}", ""]) + "\n"
    (folder / "Packages").write_text(listing)
    (folder / "Packages.gz").write_bytes(gzip.compress(listing.encode()))


def test_a_profile_switches_its_runtime_and_each_keeps_its_data(
    rt: tuple[User, str], busybox_tar: Path, podman_client: Path
) -> None:
    user, registry = rt
    named = user.qvm("start", "rt", "--runtime", "podman")
    assert "runtime: containerd -> podman" in named.stderr and "qvm restart rt" in named.stderr
    assert user.status("rt")["runtime"] == "containerd"
    user.qvm("stop", "rt")
    switched = user.qvm("start", "rt", "--runtime", "podman", timeout=1500)
    assert "containerd's data stays" in switched.stderr
    status = user.status("rt")
    assert status["runtime_version"].startswith("podman 5") and list(status["sockets"]) == ["podman"]
    assert not (user.home / "q" / "rt" / "containerd.sock").exists()
    docker_speaks_to_podman(user, busybox_tar, registry)
    podman_on_the_host(User(user.home, user.work, {**user.env, **status["environment"]}), podman_client)
    user.qvm("stop", "rt")
    user.qvm("start", "rt", "--runtime", "containerd")
    assert user.docker("context", "show").stdout.strip() == "default"
    assert f"{registry}/team/box" in user.qvm("nerdctl", "-p", "rt", "images").stdout


def docker_speaks_to_podman(user: User, busybox_tar: Path, registry: str) -> None:
    assert user.docker("context", "show").stdout.strip() == "qvm-rt"
    user.docker("import", str(busybox_tar), "base")
    box = ("run", "--rm", "base", "/bin/busybox")
    assert user.docker(*box, "echo", "from podman").stdout == "from podman\n"
    plain = user.docker(*box, "wget", "-qO-", f"http://{registry}/", check=False)
    assert "bad address" not in plain.stderr, "containers know the host by name"


def podman_on_the_host(user: User, client: Path) -> None:
    """`user` has what `qvm status` prints in the environment. Debian's own client, and a VM that stops and starts."""

    def podman(*words: str, **options: Any) -> str:
        return user.run(str(client), *words, **options).stdout

    assert "library/base" in podman("images", "--format", "{{.Repository}}")
    project = user.work / "podman"
    project.mkdir()
    (project / "Containerfile").write_text('FROM base\nRUN ["/bin/busybox", "touch", "/made"]\n')
    podman("build", "-q", "-t", "made", str(project))
    assert podman("run", "--rm", "--init", "made", "/bin/busybox", "ls", "/made") == "/made\n"
    podman("network", "create", "own")
    podman("run", "-d", "--name", "web", "--network", "own", "--restart", "always", "-p", "8391:80", "made",
           "/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/www")
    wait_for(lambda: fetch(8391) == PAGE, 30, "the published port at localhost")
    asked = podman("run", "--rm", "--network", "own", "made", "/bin/busybox", "wget", "-Y", "off", "-qO-", "http://web/")
    assert asked == PAGE, "containers of a network know each other by name"
    user.qvm("restart", "rt", timeout=900)
    wait_for(lambda: fetch(8391) == PAGE, 60, "the container with a restart policy")
    podman("rm", "-f", "-t", "0", "web")

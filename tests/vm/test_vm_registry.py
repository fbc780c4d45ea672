"""Docker and registries of the host: plain, mirrored, with a private authority and a login; and no network at all."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import QVM, User, wait_for
from vm_registry import HOST, PASSWORD, USER, make_certificates, serve_registry

pytestmark = [pytest.mark.vm, pytest.mark.long, pytest.mark.timeout(1500)]

# testcontainers starts its reaper first. The real one is not in the registries that tests may use: this one answers
# as it would, and only where the engine's socket is mounted where it looks for it.
REAPER = (
    'test -S /var/run/docker.sock && echo "stand-in Started!" && '
    'nc -ll -p 8080 -e sh -c "while read line; do echo ACK; done"'
)
TESTCONTAINERS = """
import urllib.request
from testcontainers.core.container import DockerContainer
from testcontainers.core.waiting_utils import wait_for_logs
with DockerContainer("busybox:latest").with_command(
    "sh -c 'echo is up; httpd -f -p 80 -h /www'").with_exposed_ports(80) as web:
    wait_for_logs(web, "is up")
    address = f"http://{web.get_container_host_ip()}:{web.get_exposed_port(80)}/"
    for turn in range(40):
        try:
            print(urllib.request.urlopen(address, timeout=5).read().decode())
            break
        except OSError:
            __import__("time").sleep(0.25)
"""


@dataclass
class World:
    user: User
    plain: str
    """HOST:PORT of the registry without TLS."""
    closed: str
    """Of the one with a private authority and a login."""
    profile: Path

    def configure(self, docker: str) -> None:
        lines = self.profile.read_text().splitlines()
        at = next(number for number, line in enumerate(lines) if line.startswith("docker:"))
        end = next(number for number in range(at + 1, len(lines) + 1)
                   if number == len(lines) or not lines[number].startswith(" "))
        self.profile.write_text("\n".join([*lines[:at], docker, *lines[end:]]) + "\n")


@pytest.fixture(scope="module")
def world(user: User, busybox_tar: Path) -> Iterator[World]:
    ca, certificate, key = make_certificates(user.home)
    with (
        serve_registry(user.home / "plain") as plain,
        serve_registry(user.home / "closed", tls=(certificate, key), login=True) as closed,
    ):
        profile = user.home / "q" / "reg" / "qvm.yaml"
        profile.parent.mkdir(parents=True)
        profile.write_text(
            f"docker:\n  insecure-registries: ['{HOST}:{plain}']\nregistryMirrors: ['http://10.0.2.2:{plain}']\n"
            f"caCerts: ['{ca}']\nruntime: docker\nmounts: none\ndisk: 20\n"
        )
        user.qvm("start", "reg")
        user.docker("import", "-c", 'CMD ["/bin/sh"]', str(busybox_tar), "base")
        yield World(user, f"{HOST}:{plain}", f"{HOST}:{closed}", profile)


def test_push_to_a_plain_registry_and_pull_through_the_mirror(world: World) -> None:
    user = world.user
    user.docker("tag", "base", f"{world.plain}/library/busybox:latest")
    user.docker("push", "-q", f"{world.plain}/library/busybox:latest")
    user.docker("rmi", "-f", f"{world.plain}/library/busybox:latest")
    user.docker("pull", "-q", "busybox")
    assert user.docker("run", "--rm", "busybox", "echo", "pulled").stdout == "pulled\n"


def test_a_private_authority_and_the_hosts_login(world: World) -> None:
    user = world.user
    image = f"{world.closed}/team/tool:1"
    user.docker("tag", "base", image)
    refused = user.docker("push", "-q", image, check=False)
    assert refused.returncode != 0 and "no basic auth credentials" in refused.stderr, refused.stderr
    user.docker("login", "-u", USER, "--password-stdin", world.closed, input=PASSWORD.encode())
    user.docker("push", "-q", image)
    user.docker("rmi", image)
    user.docker("pull", "-q", image)
    shown = user.qvm("ssh", "reg", "--", f"curl -s -o /dev/null -w '%{{http_code}}' https://{world.closed}/v2/")
    assert shown.stdout == "401", "the guest's own programs trust the authority too"


def test_containers_know_the_host_by_name(world: World) -> None:
    plain = world.plain
    for options in (["--network", "bridge"], ["--add-host", f"{HOST}:host-gateway"]):
        asked = world.user.docker("run", "--rm", *options, "base", "wget", "-qO-", f"http://{plain}/v2/")
        assert asked.stdout == "{}"
    world.user.docker("network", "create", "own")
    asked = world.user.docker("run", "--rm", "--network", "own", "base", "wget", "-qO-", f"http://{plain}/v2/")
    assert asked.stdout == "{}"


def test_testcontainers_needs_only_what_status_prints(world: World) -> None:
    user = world.user
    from testcontainers.core.config import testcontainers_config

    user.docker("build", "-q", "-t", testcontainers_config.ryuk_image, "-", input=(
        f"FROM base\nENTRYPOINT [\"/bin/sh\", \"-c\", {shell_json(REAPER)}]\nEXPOSE 8080\n".encode()
    ))
    said = user.status("reg")["environment"]
    shown = user.qvm("status", "reg").stdout
    assert all(f"{name}={value}" in shown for name, value in said.items())
    script = user.work / "containers.py"
    script.write_text(TESTCONTAINERS)
    plain = {name: value for name, value in user.env.items() if name != "DOCKER_CONFIG"}
    done = User(user.home, user.work, {**plain, **said}).run(sys.executable, str(script))
    assert "hello from a container" in done.stdout


def shell_json(text: str) -> str:
    import json

    return json.dumps(text)


def test_a_crashed_engine_comes_back_with_its_containers(world: World) -> None:
    user = world.user
    user.docker("run", "-d", "--name", "kept", "--restart", "always", "base", "sleep", "100000")
    user.qvm("ssh", "reg", "--", "sudo kill -9 $(pidof dockerd)")

    def back() -> bool:
        return user.docker("ps", "-q", "--filter", "name=kept", check=False).stdout.strip() != ""

    wait_for(back, 120, "dockerd and its container")
    assert user.docker("exec", "kept", "echo", "alive").stdout == "alive\n"


def test_wrong_settings_fail_with_the_engines_words_and_right_ones_start_offline(world: World) -> None:
    user = world.user
    user.qvm("stop", "reg")
    world.configure("docker: {no-such-setting: 1}")
    failed = user.qvm("start", "reg", check=False)
    assert failed.returncode != 0 and "no-such-setting" in failed.stderr and "qvm.yaml" in failed.stderr, failed.stderr
    assert user.processes() == []
    world.configure("docker: {labels: [a=b]}")
    # Without any network interface but loopback; as the same user.
    start = f"ip link set lo up; exec {shlex.quote(str(QVM))} start reg"
    user.run("unshare", "--map-current-user", "--keep-caps", "--net", "sh", "-c", start)
    assert user.docker("run", "--rm", "--pull=never", "base", "echo", "offline").stdout == "offline\n"
    assert user.docker("exec", "kept", "echo", "restarted").stdout == "restarted\n"
    assert user.docker("info", "-f", "{{.Labels}}").stdout.strip() == "[a=b]"

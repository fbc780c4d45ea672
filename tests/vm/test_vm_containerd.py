"""The default runtime, containerd, through `qvm nerdctl`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import User, fetch, wait_for

from qvm.arch import AARCH64, X86_64, host_arch

FAR = AARCH64 if host_arch() is X86_64 else X86_64
pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def box(user: User, busybox_tar: Path) -> User:
    user.qvm("start", "--env", "GREETING=hello there")
    shutil.copy(busybox_tar, user.work / "busybox.tar")
    return user


def test_run_publish_and_build(box: User, busybox_tar: Path) -> None:
    project = box.work / "project"
    project.mkdir()
    subprocess.run(["tar", "-C", project, "-xf", busybox_tar, "./bin/busybox", "./www"], check=True)
    (project / "Dockerfile").write_text(
        "FROM scratch\nCOPY bin/busybox /bin/busybox\nCOPY www /www\n"
        'CMD ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/www"]\n'
    )
    box.qvm("nerdctl", "build", "-t", "site", ".", cwd=project)
    assert "site" in box.qvm("nerdctl", "images").stdout
    box.qvm("nerdctl", "run", "-d", "--name", "web", "-p", "8090:80", "site")
    assert wait_for(lambda: fetch(8090), 10, "port 8090") == "hello from a container\n"
    box.qvm("nerdctl", "rm", "-f", "web")
    wait_for(lambda: fetch(8090) is None, 5, "port 8090 closed")
    failed = box.qvm("nerdctl", "run", "--rm", "site", "/bin/busybox", "sh", "-c", "exit 9", check=False)
    assert failed.returncode == 9


def test_nginx_from_debian(box: User, nginx_tar: Path) -> None:
    shutil.copy(nginx_tar, box.work / "nginx.tar")
    (box.work / "Dockerfile").write_text(
        'FROM scratch\nADD nginx.tar /\nCMD ["/usr/sbin/nginx", "-g", "daemon off;"]\n'
    )
    box.qvm("nerdctl", "build", "-t", "nginx", ".")
    box.qvm("nerdctl", "run", "-d", "--name", "nginx", "-p", "8091:80", "nginx")
    page = wait_for(lambda: fetch(8091), 20, "nginx on port 8091")
    assert "nginx" in page
    box.qvm("nerdctl", "rm", "-f", "nginx")


def test_guest_is_what_was_asked_for(box: User) -> None:
    status = box.status("default")
    assert status["runtime"] == "containerd"
    assert set(status["sockets"]) >= {"containerd"}
    assert box.qvm("ssh", "--", "echo $GREETING").stdout.strip() == "hello there"
    assert box.qvm("ssh", "--", "systemctl is-system-running", check=False).stdout.strip() in ("running", "starting")
    assert box.qvm("ssh", "--", "cat /proc/1/comm").stdout.strip() == "systemd"
    # A guest user without root must not reach the agent: its ports are root's alone.
    ports = box.qvm("ssh", "--", "stat -Lc '%U %a' /dev/virtio-ports/*").stdout.splitlines()
    assert ports and all(line == "root 600" for line in ports)


def test_another_architectures_containers_run_and_are_built(box: User, foreign_busybox: Path) -> None:
    wait_for(lambda: FAR.oci_platform in (box.status("default")["binfmt"] or []), 60, "the emulators' registration")
    project = box.work / "far"
    project.mkdir()
    shutil.copy(foreign_busybox, project / "busybox")
    (project / "Dockerfile").write_text(
        'FROM scratch\nCOPY busybox /busybox\nRUN ["/busybox", "sh", "-c", "/busybox uname -m >/built"]\n'
    )
    platform = ("--platform", FAR.oci_platform)
    box.qvm("nerdctl", "--", "build", *platform, "-t", "far", ".", cwd=project)
    shown = box.qvm("nerdctl", "--", "run", "--rm", *platform, "far", "/busybox", "sh", "-c",
                    "/busybox uname -m; /busybox cat /built")
    assert shown.stdout.split() == [FAR.name, FAR.name]

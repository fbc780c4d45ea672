"""One docker instance through its whole life, driven by the host's docker CLI."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import User, fetch, use_plugins, wait_for

from qvm.arch import AARCH64, X86_64, host_arch

FAR = AARCH64 if host_arch() is X86_64 else X86_64
pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def dev(user: User, busybox_tar: Path, docker_plugins: Path) -> User:
    use_plugins(user, docker_plugins)
    (user.home / "docker" / "config.json").write_text('{\n\t"credsStore": "mine",\n\t"currentContext": "default"\n}\n')
    user.qvm("start", "--profile", "dev", "--runtime", "docker", "--cpus", "2", "--memory", "2", "--disk", "20")
    user.docker("import", "-c", 'CMD ["/bin/sh"]', str(busybox_tar), "busybox:test")
    return user


def test_context_is_current_and_status_tells_the_truth(dev: User) -> None:
    assert dev.docker("context", "show").stdout.strip() == "qvm-dev"
    assert "qvm-dev" in dev.docker("context", "ls").stdout
    status = dev.status("dev")
    assert status["state"] == "running"
    assert status["runtime"] == "docker"
    assert status["requirements"]["runtime"] == "done"
    assert Path(status["sockets"]["docker"]).stat().st_mode & 0o777 == 0o600
    assert [row["profile"] for row in json.loads(dev.qvm("list", "--json").stdout)["result"]] == ["dev"]
    assert "dev" in dev.qvm("list").stdout


def test_starting_again_changes_nothing(dev: User) -> None:
    before = dev.status("dev")["pid"]
    again = dev.qvm("start", "dev", "--cpus", "1")
    assert dev.status("dev")["pid"] == before
    assert "cpus" in again.stderr and "restart" in again.stderr


def test_published_port_appears_and_vanishes(dev: User) -> None:
    dev.docker("run", "-d", "--name", "web", "-p", "8081:80", "busybox:test", "httpd", "-f", "-p", "80", "-h", "/www")
    assert wait_for(lambda: fetch(8081), 10, "port 8081") == "hello from a container\n"
    assert fetch(8081, "127.0.0.1") == "hello from a container\n"
    forward = next(entry for entry in dev.status("dev")["forwards"] if entry["port"] == 8081)
    assert forward["state"] == "forwarding"
    dev.docker("rm", "-f", "web")

    def refused() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", 8081)) != 0

    wait_for(refused, 5, "port 8081 closed")


def test_taken_port_is_reported_and_retried(dev: User) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 8082))
        taken.listen()
        dev.docker("run", "-d", "--name", "late", "-p", "8082:80", "busybox:test",
                   "httpd", "-f", "-p", "80", "-h", "/www")

        def reported() -> bool:
            return any(entry["port"] == 8082 and entry["state"] == "taken" for entry in dev.status("dev")["forwards"])

        wait_for(reported, 10, "the taken port in status")
    assert wait_for(lambda: fetch(8082), 10, "port 8082 once free") == "hello from a container\n"
    dev.docker("rm", "-f", "late")


def test_guest_loopback_listener_is_reachable(dev: User) -> None:
    dev.qvm("ssh", "dev", "--", "sudo systemd-run --unit=echo python3 -m http.server --bind 127.0.0.1 8083")
    assert wait_for(lambda: fetch(8083), 20, "the guest's loopback listener") is not None
    dev.qvm("ssh", "dev", "--", "sudo systemctl stop echo")


def test_working_directory_is_mounted_with_the_callers_ownership(dev: User) -> None:
    (dev.work / "from host.txt").write_text("host\n")
    shown = dev.docker("run", "--rm", "-v", f"{dev.work}:/app", "busybox:test",
                       "sh", "-c", "cat '/app/from host.txt'; echo guest > /app/new; stat -c %u '/app/from host.txt'")
    assert shown.stdout.split() == ["host", str(dev.work.stat().st_uid)]
    made = dev.work / "new"
    assert made.read_text() == "guest\n"
    assert made.stat().st_uid == dev.work.stat().st_uid


def test_ssh_keeps_directory_and_exit_code(dev: User) -> None:
    assert dev.qvm("ssh", "dev", "--", "pwd").stdout.strip() == str(dev.work)
    assert dev.qvm("ssh", "dev", "--", "exit 7", check=False).returncode == 7
    assert "Linux" in dev.qvm("exec", "dev", "--", "uname", "-a").stdout
    config = dev.qvm("ssh-config", "dev").stdout
    assert "Host qvm-dev" in config and "StrictHostKeyChecking yes" in config
    file = dev.home / "ssh config"
    file.write_text(config)
    assert dev.run("ssh", "-F", str(file), "qvm-dev", "hostname").stdout.strip() == dev.status("dev")["hostname"]


def test_build_from_scratch_and_compose(dev: User, busybox_tar: Path) -> None:
    project = dev.work / "project"
    project.mkdir()
    subprocess.run(["tar", "-C", project, "-xf", busybox_tar, "./bin/busybox", "./www"], check=True)
    (project / "Dockerfile").write_text(
        "FROM scratch\nCOPY bin/busybox /bin/busybox\nCOPY www /www\nEXPOSE 80\n"
        'CMD ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/www"]\n'
    )
    dev.docker("build", "-t", "site", ".", cwd=project)
    (project / "compose.yaml").write_text(
        "services:\n  site:\n    image: site\n    pull_policy: never\n    ports: ['8084:80']\n"
        "    volumes: ['./www:/www:ro']\n"
    )
    dev.docker("compose", "up", "-d", cwd=project)
    assert wait_for(lambda: fetch(8084), 10, "the composed service") == "hello from a container\n"
    (project / "www" / "index.html").write_text("changed on the host\n")
    assert wait_for(lambda: fetch(8084) == "changed on the host\n", 10, "the change seen in the container")
    dev.docker("compose", "down", cwd=project)


def emulated(dev: User) -> str:
    """What `uname -m` says in a container of the other architecture."""
    done = dev.docker("run", "--rm", "--platform", FAR.oci_platform, "busybox:far", "/busybox", "uname", "-m")
    return done.stdout.strip()


def test_another_architectures_containers_run_and_are_built(dev: User, foreign_busybox: Path) -> None:
    """By binfmt_misc, in a fork of a warm image."""
    assert wait_for(lambda: FAR.oci_platform in (dev.status("dev")["binfmt"] or []), 60, "the emulators' registration")
    assert FAR.oci_platform in dev.qvm("status", "dev").stdout
    project = dev.work / "far"
    project.mkdir()
    shutil.copy(foreign_busybox, project / "busybox")
    (project / "Dockerfile").write_text(
        "FROM scratch\nCOPY busybox /busybox\n"
        'RUN ["/busybox", "sh", "-c", "/busybox uname -m >/built"]\nCMD ["/busybox", "cat", "/built"]\n'
    )
    dev.docker("build", "--platform", FAR.oci_platform, "-t", "busybox:far", ".", cwd=project)
    assert dev.docker("run", "--rm", "--platform", FAR.oci_platform, "busybox:far").stdout.strip() == FAR.name
    assert dev.docker("image", "inspect", "-f", "{{.Architecture}}", "busybox:far").stdout.strip() == FAR.oci
    assert emulated(dev) == FAR.name


def test_logs(dev: User) -> None:
    assert dev.qvm("logs", "dev", "serial").stdout
    assert "ready" in dev.qvm("logs", "dev", "supervisor").stdout
    assert "dockerd" in dev.qvm("logs", "dev", "runtime").stdout


def test_nothing_listens_beyond_loopback(dev: User) -> None:
    """Every TCP listener of our processes is on loopback (proc(5), /proc/net/tcp: hex address, state 0A)."""
    pids = {line.split()[0] for line in dev.processes()}
    inodes = {
        str(link.readlink())
        for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()
    }
    for table, loopback in (("tcp", {"0100007F"}), ("tcp6", {"00000000000000000000000001000000"})):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                assert fields[1].split(":")[0] in loopback, row


def test_stop_restores_context_and_start_keeps_containers(dev: User) -> None:
    dev.docker("run", "-d", "--name", "kept", "--restart", "always", "-v", "kept:/data", "busybox:test",
               "sh", "-c", "echo stays > /data/file; sleep 100000")
    dev.qvm("stop", "dev")
    assert dev.status("dev")["state"] == "stopped"
    assert dev.docker("context", "show").stdout.strip() == "default"
    assert '"credsStore": "mine"' in (dev.home / "docker" / "config.json").read_text()
    assert dev.processes() == []
    dev.qvm("start", "dev")
    assert dev.docker("exec", "kept", "cat", "/data/file").stdout == "stays\n"
    assert wait_for(lambda: dev.status("dev")["binfmt"], 120, "the emulators after a cold boot")
    assert emulated(dev) == FAR.name
    dev.qvm("restart", "dev", "--cpus", "1", "--no-binfmt")
    assert dev.qvm("ssh", "dev", "--", "nproc").stdout.strip() == "1"
    assert wait_for(lambda: dev.status("dev")["binfmt"] == [], 120, "the emulators are off")
    assert "qemu-" not in dev.qvm("ssh", "dev", "--", "ls", "/proc/sys/fs/binfmt_misc").stdout
    dev.docker("rm", "-f", "kept")


def test_delete_keeps_the_data_disk_and_data_removes_it(dev: User) -> None:
    dev.qvm("delete", "dev", "-f")
    assert dev.qvm("status", "dev", check=False).returncode == 3
    assert "qvm-dev" not in dev.docker("context", "ls").stdout
    dev.qvm("start", "dev", "--disk", "24")
    shown = dev.docker("run", "--rm", "--pull=never", "-v", "kept:/data", "busybox:test", "cat", "/data/file")
    assert shown.stdout == "stays\n"
    size = int(dev.qvm("ssh", "dev", "--", "df --output=size -B1 /var/lib/docker | tail -1").stdout)
    assert size > 22 * 2**30
    shrink = dev.qvm("start", "dev", "--disk", "10", check=False)
    assert shrink.returncode == 2 and "disk" in shrink.stderr
    dev.qvm("delete", "dev", "-f", "--data")
    assert not (dev.home / "q" / "_data" / "dev.qcow2").exists()
    assert dev.processes() == []

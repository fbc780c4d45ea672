"""Guests of other architectures than this host's, by software emulation: everything the host's own guests can do.

QVM_TEST_ARCHES names the architectures, separated by commas (default: aarch64 alone, or x86_64 on an Arm host): each
needs its image, which `qvm image build debian-13 --arch NAME` makes. Where docker is looked at, is DOCKER_ARCHES.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import TOOLS, User, clear, fetch, make_user, wait_for

from qvm.arch import AARCH64, X86_64, Arch, find_arch, host_arch
from qvm.qemu.probe import probe_qemu

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1800)]

OTHER = AARCH64 if host_arch() is X86_64 else X86_64
ARCHES = [word.strip() for word in os.environ.get("QVM_TEST_ARCHES", OTHER.name).split(",")]
DOCKER_ARCHES = (OTHER.name,)


@dataclass
class Guest:
    user: User
    arch: Arch

    def ssh(self, command: str) -> str:
        return self.user.qvm("ssh", "far", "--", command).stdout.strip()

    @property
    def restores(self) -> bool:
        """Whether this QEMU goes on from saved states of it."""
        since = self.arch.restores_from
        return since is not None and probe_qemu(self.arch).version >= since

    @property
    def has_docker(self) -> bool:
        return self.arch.name in DOCKER_ARCHES


@pytest.fixture(scope="module", params=ARCHES)
def guest(request: pytest.FixtureRequest, cache_home: Path) -> Iterator[Guest]:
    """A VM of that architecture: a fork where QEMU can restore the machine, with docker where that is looked at."""
    arch = find_arch(str(request.param))
    assert arch is not None, "QVM_TEST_ARCHES"
    user = make_user(cache_home)
    made = Guest(user, arch)
    started = user.qvm("start", "far", "--arch", arch.name, "--runtime", "docker" if made.has_docker else "none",
                       timeout=1500)
    if made.restores:
        assert "starting cold" not in started.stderr, started.stderr
    else:
        assert "starting cold" in started.stderr, "why it takes longer is said"
    yield made
    clear(user)


@pytest.fixture
def busybox(guest: Guest, cache_home: Path) -> str:
    """A container image of the guest's architecture."""
    folder = cache_home / "test-tools" / "busybox"
    subprocess.run([TOOLS / "fetch-busybox.sh", folder, guest.arch.debian], check=True, timeout=600)
    root = guest.user.home / "root"
    if not root.exists():
        (root / "bin").mkdir(parents=True)
        shutil.copy(folder / f"busybox-{guest.arch.debian}", root / "bin" / "busybox")
        for name in ("sh", "uname", "cat", "httpd"):
            (root / "bin" / name).symlink_to("busybox")
        (root / "index.html").write_text("hello from afar\n")
        tar = guest.user.home / "root.tar"
        subprocess.run(["tar", "-C", root, "-cf", tar, "."], check=True)
        guest.user.docker("import", "--platform", guest.arch.oci_platform, str(tar), "busybox:far")
    return "busybox:far"


def test_the_guest_is_of_that_architecture(guest: Guest) -> None:
    status = guest.user.status("far")
    assert (status["arch"], status["accel"], status["state"]) == (guest.arch.name, "tcg", "running")
    assert guest.ssh("uname -m; dpkg --print-architecture").split() == [guest.arch.name, guest.arch.debian]
    assert "2" in guest.ssh("nproc")


def test_the_working_directory_is_mounted(guest: Guest) -> None:
    (guest.user.work / "from host").write_text("host\n")
    assert guest.ssh("cat 'from host'; echo guest >new").split() == ["host"]
    assert (guest.user.work / "new").read_text() == "guest\n"


def test_ports_of_the_guest_are_reached(guest: Guest) -> None:
    guest.ssh("sudo systemd-run --unit=web python3 -m http.server --bind 127.0.0.1 8093")
    assert wait_for(lambda: fetch(8093), 60, "the guest's listener") is not None
    guest.ssh("sudo systemctl stop web")


def test_a_container_runs_and_publishes(guest: Guest, request: pytest.FixtureRequest) -> None:
    if not guest.has_docker:
        pytest.skip("docker is looked at on the other of x86_64 and aarch64 only")
    image = request.getfixturevalue("busybox")
    docker = guest.user.docker
    assert docker("run", "--rm", image, "uname", "-m").stdout.strip() == guest.arch.name
    where = f"{guest.user.work}:/work"
    assert docker("run", "--rm", "-v", where, image, "cat", "/work/new").stdout == "guest\n"
    docker("run", "-d", "--name", "web", "-p", "8094:80", image, "httpd", "-f", "-p", "80", "-h", "/")
    assert wait_for(lambda: fetch(8094), 60, "the published port") == "hello from afar\n"


def test_suspended_it_goes_on_where_it_was(guest: Guest) -> None:
    if not guest.restores:
        refused = guest.user.qvm("suspend", "far", check=False)
        assert refused.returncode != 0 and "does not restore" in refused.stderr
        return
    boot = guest.ssh("sudo systemd-run --quiet --unit=still sleep 1000; cat /proc/sys/kernel/random/boot_id")
    guest.user.qvm("suspend", "far")
    assert guest.user.status("far")["state"] == "suspended"
    began = time.monotonic()
    guest.user.qvm("start", "far", timeout=900)
    print(f"{guest.arch.name}: resumed after {time.monotonic() - began:.1f} s")
    assert guest.ssh("cat /proc/sys/kernel/random/boot_id; systemctl is-active still").split() == [boot, "active"]
    assert guest.ssh("cat 'from host'") == "host", "mounts are back"
    if guest.has_docker:
        assert guest.user.docker("ps", "--format", "{{.Names}}").stdout.split() == ["web"]
        assert wait_for(lambda: fetch(8094), 60, "the published port") == "hello from afar\n"
        guest.user.docker("rm", "-f", "web")


def test_a_snapshot_brings_back_what_was(guest: Guest) -> None:
    if not guest.restores:
        pytest.skip("this QEMU does not restore such machines")
    guest.ssh("echo before >~/note; sync")
    guest.user.qvm("snapshot", "create", "far", "s1", timeout=600)
    guest.ssh("echo after >~/note")
    guest.user.qvm("snapshot", "restore", "far", "s1", timeout=600)
    if guest.user.status("far")["state"] != "running":
        guest.user.qvm("start", "far", timeout=600)
    assert guest.ssh("cat ~/note") == "before"


def test_run_in_a_throw_away_vm(guest: Guest) -> None:
    times = []
    for _ in range(2):
        began = time.monotonic()
        done = guest.user.qvm("run", "--arch", guest.arch.oci, "--", "uname", "-m", timeout=1200)
        times.append(time.monotonic() - began)
        assert done.stdout.strip() == guest.arch.name
    print(f"{guest.arch.name}: run after {times[0]:.1f} and {times[1]:.1f} s")
    assert guest.user.qvm("run", "--arch", guest.arch.name, "--", "sh", "-c", "exit 7", check=False).returncode == 7


def test_stop_and_cold_start(guest: Guest) -> None:
    """The last of the module: the guest hears that it is to end, and boots from its own disks."""
    guest.ssh("echo kept >~/kept")
    stopped = json.loads(guest.user.qvm("stop", "far", "--json").stdout)["result"]
    assert stopped["how"] == "powerdown", stopped
    guest.user.qvm("start", "far", timeout=1200)
    assert guest.ssh("cat ~/kept; uname -m").split() == ["kept", guest.arch.name]

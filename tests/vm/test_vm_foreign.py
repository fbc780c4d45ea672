"""A disk that qvm did not make (Debian by mkosi: UEFI, GRUB, its own kernel, cloud-init), through a VM's whole life.

The x86_64 disk (on an Arm host: the aarch64 one) is always run; QVM_TEST_FOREIGN_ARCHES names more, separated by
commas. tests/tools/make-cloud-disk.sh makes them. The first run boots the disk, has docker installed from Debian's
mirror and freezes that, which takes minutes. Later runs fork it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import TOOLS, User, fetch, wait_for

from qvm.arch import host_arch

ARCHES = list(dict.fromkeys([
    host_arch().name, *filter(None, os.environ.get("QVM_TEST_FOREIGN_ARCHES", "").split(",")),
]))  # fmt: skip
pytestmark = [pytest.mark.vm, pytest.mark.long, pytest.mark.timeout(3600)]
PATIENCE = 3000.0


@dataclass
class Cloud:
    """The VM under test."""

    user: User
    arch: str
    image: str

    def sh(self, script: str) -> str:
        return self.user.qvm("ssh", "cloud", "--", f"cd /; {script}", timeout=300).stdout.strip()

    def status(self) -> dict[str, Any]:
        return self.user.status("cloud")

    def start(self, *words: str) -> str:
        return self.user.qvm("start", "cloud", *words, timeout=PATIENCE).stderr


def have_image(user: User, cache_home: Path, arch: str) -> str:
    """Import the disk under a name, unless that was done before with the same file."""
    folder = cache_home / "test-tools" / "cloud-disk"
    subprocess.run([TOOLS / "make-cloud-disk.sh", folder, arch], check=True, capture_output=True, timeout=3000)
    digest = "sha256:" + (folder / f"debian-13-{arch}.sha256").read_text().strip()
    name = "test-cloud"
    rows = json.loads(user.qvm("image", "list", "--json").stdout)["result"]
    if not any((row["name"], row["arch"], row["state"], row.get("digest")) == (name, arch, "ready", digest)
               for row in rows):
        user.qvm("image", "import", str(folder / f"debian-13-{arch}.raw"), "--name", name, "--digest", digest,
                 "--force", timeout=600)
    return name


@pytest.fixture(scope="module", params=ARCHES)
def cloud(request: pytest.FixtureRequest, user: User, cache_home: Path, busybox_tar: Path) -> Any:
    cloud = Cloud(user, request.param, have_image(user, cache_home, request.param))
    (user.work / "from-host").write_text("hello from the host\n")
    said = cloud.start("--image", cloud.image, "--arch", cloud.arch, "--runtime", "docker", "--hostname", "cloudy",
                       "--env", "GREETING=hello", "--disk", "12")
    assert "starting cold" not in said, said
    user.docker("import", "-c", 'CMD ["/bin/sh"]', str(busybox_tar), "busybox:test")
    yield cloud
    user.qvm("delete", "cloud", "-f", "--data")


def test_it_is_the_images_own_system(cloud: Cloud) -> None:
    assert cloud.sh("test -d /sys/firmware/efi && uname -m") == cloud.arch
    assert "cloud-init=disabled" not in cloud.sh("cat /proc/cmdline")
    assert cloud.sh("dpkg -S /lib/modules/$(uname -r)/modules.order /usr/bin/cloud-init /usr/bin/dockerd | cut -d: -f1"
                    ).split() == [f"linux-image-{cloud.sh('uname -r')}", "cloud-init", "docker.io"]
    assert cloud.sh("systemctl is-active ssh qvm-agent docker").split() == ["active"] * 3
    failed = cloud.sh("systemctl --failed --plain --no-legend")
    assert not failed, failed
    status = cloud.status()
    assert (status["state"], status["arch"], status["image"]) == ("running", cloud.arch, cloud.image)


def test_who_it_is(cloud: Cloud) -> None:
    assert cloud.sh("hostname; cat /etc/hostname").split() == ["cloudy", "cloudy"]
    assert cloud.sh("echo $GREETING") == "hello"
    assert cloud.sh("getent hosts host.docker.internal | cut -d' ' -f1") == "10.0.2.2"
    assert "10.0.2.3" in cloud.sh("cat /etc/resolv.conf")
    uid = os.getuid()
    assert cloud.sh("id -u") == str(uid) and cloud.sh("sudo -n id -u" if uid else "id -u") == "0"


def test_ssh_knows_its_host_key_and_no_other(cloud: Cloud) -> None:
    config = Path(cloud.user.env["QVM_HOME"]) / "_instances" / "cloud" / "ssh" / "config"
    done = cloud.user.run("ssh", "-F", str(config), "-o", "StrictHostKeyChecking=yes", "-o", "ControlMaster=no",
                          "-o", "ControlPath=none", "qvm-cloud", "uname", timeout=120)
    assert done.stdout == "Linux\n"
    known = config.with_name("host_ed25519.pub").read_text().split()[1]
    assert cloud.sh("cut -d' ' -f2 /etc/ssh/ssh_host_*_key.pub").split() == [known]


def test_disks_have_their_sizes(cloud: Cloud) -> None:
    root, data = (int(words) for words in cloud.sh("df -B1 --output=size / /var/lib/docker | tail -n 2").split())
    assert root > 15 << 30, "cloud-init has grown the root"
    wait_for(lambda: int(cloud.sh("df -B1 --output=size /var/lib/docker | tail -n 1")) > 11 << 30, 60,
             f"the data disk grew beyond {data}")


def test_the_working_directory_is_mounted(cloud: Cloud) -> None:
    work = cloud.user.work
    assert cloud.sh(f"cat '{work}/from-host'") == "hello from the host"
    cloud.sh(f"echo back > '{work}/from-guest'")
    assert (work / "from-guest").read_text() == "back\n"
    assert (work / "from-guest").stat().st_uid == os.getuid()


def test_containers_and_their_ports(cloud: Cloud) -> None:
    user = cloud.user
    if cloud.arch == host_arch().name:
        assert user.docker("run", "--rm", "busybox:test", "uname", "-m").stdout.strip() == cloud.arch
    user.docker("run", "-d", "--name", "web", "--restart", "always", "-p", "8085:80", "busybox:test", "httpd", "-f",
                "-p", "80", "-h", "/www")
    assert wait_for(lambda: fetch(8085), 60, "port 8085") == "hello from a container\n"


def test_suspended_and_resumed(cloud: Cloud) -> None:
    before = cloud.sh("cat /proc/sys/kernel/random/boot_id")
    cloud.sh("echo kept > /run/kept")
    cloud.user.qvm("suspend", "cloud", timeout=300)
    assert cloud.status()["state"] != "running"
    said = cloud.start()
    assert "cold" not in said, said
    assert cloud.sh("cat /proc/sys/kernel/random/boot_id /run/kept").split() == [before, "kept"]
    assert wait_for(lambda: fetch(8085), 60, "port 8085 after the resume") == "hello from a container\n"


def test_snapshot_and_back(cloud: Cloud) -> None:
    cloud.sh("echo one > /root/state || echo one | sudo tee /root/state")
    cloud.user.qvm("snapshot", "create", "cloud", "clean", timeout=300)
    cloud.sh("echo two > /root/state || echo two | sudo tee /root/state")
    cloud.user.qvm("snapshot", "restore", "cloud", "clean", timeout=PATIENCE)
    said = cloud.start()
    assert "cold" not in said, said
    assert cloud.sh("cat /root/state || sudo cat /root/state") == "one"
    cloud.user.qvm("snapshot", "delete", "cloud", "clean", timeout=300)


def test_each_run_is_a_machine_of_its_own(cloud: Cloud) -> None:
    """Forks too: seconds, and nothing in common."""
    look = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; cat from-host; uname -m"
    seen = []
    for _ in range(2):
        began = time.monotonic()
        done = cloud.user.qvm("run", "--image", cloud.image, "--arch", cloud.arch, "--", "sh", "-c", look,
                              timeout=PATIENCE)
        seen.append((done.stdout.splitlines(), time.monotonic() - began))
    (first, _), (second, seconds) = seen
    assert first[2:] == second[2:] == ["hello from the host", cloud.arch]
    assert re.fullmatch("[0-9a-f]{32}", first[0]) and not set(first[:2]) & set(second[:2])
    assert seconds < 60, "it was booted, not forked"


def test_booted_anew_by_its_own_firmware(cloud: Cloud) -> None:
    boot, machine = cloud.sh("cat /proc/sys/kernel/random/boot_id /etc/machine-id").split()
    cloud.user.qvm("restart", "cloud", timeout=PATIENCE)
    assert cloud.status()["state"] == "running"
    after = cloud.sh("cat /proc/sys/kernel/random/boot_id /etc/machine-id").split()
    assert after[0] != boot and after[1] == machine
    test_who_it_is(cloud)
    test_ssh_knows_its_host_key_and_no_other(cloud)
    test_the_working_directory_is_mounted(cloud)
    assert wait_for(lambda: fetch(8085), 120, "port 8085 after the restart") == "hello from a container\n"
    assert "error" not in json.loads(cloud.sh("cloud-init status --format=json || true"))["status"]
    assert cloud.sh("systemctl --failed --plain --no-legend") == ""


def test_what_is_in_use_is_not_removed(cloud: Cloud) -> None:
    refused = cloud.user.qvm("image", "rm", cloud.image, check=False)
    assert refused.returncode == 1 and "ground of 'cloud'" in refused.stderr


def test_stopped_and_deleted(cloud: Cloud) -> None:
    cloud.user.qvm("stop", "cloud", timeout=300)
    assert cloud.status()["state"] == "stopped"
    cloud.user.qvm("delete", "cloud", "-f")
    assert not (Path(cloud.user.env["QVM_HOME"]) / "_instances" / "cloud").exists()
    assert (Path(cloud.user.env["QVM_HOME"]) / "_data" / "cloud.qcow2").exists(), "images and volumes are kept"

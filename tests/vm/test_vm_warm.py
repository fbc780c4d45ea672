"""Warm images with real guests: made once, forked in a second, never shared by mistake, never relied on blindly."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import User, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1800)]

MAKES = "booting it once"
ROUNDS = int(os.environ.get("QVM_TEST_ROUNDS", "3"))
"""How often the data disk is filled, its VM killed and deleted. The issue's number is 30."""


def cache(user: User, tmp_path: Path) -> Path:
    """A cache of the test's own, with the image of the user's: what it makes and breaks is nobody else's.

    Its path is longer than that of a socket may be.
    """
    folder = tmp_path / ("cache" * 20)
    folder.mkdir()
    for name in ("images", "tools", "apt", "probe", "test-tools"):
        source = Path(user.env["QVM_CACHE_HOME"]) / name
        if source.exists():
            (folder / name).symlink_to(source)
    return folder


@pytest.fixture
def fresh(user: User, tmp_path: Path) -> User:
    """The same user with no warm image at all."""
    return User(user.home, user.work, {**user.env, "QVM_CACHE_HOME": str(cache(user, tmp_path))})


def warm_images(user: User) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(user.qvm("image", "warm", "--list", "--json").stdout)["result"]
    return rows


def sh(user: User, profile: str, script: str) -> str:
    return user.qvm("ssh", profile, "--", script).stdout.strip()


def test_one_maker_at_a_time_and_the_others_use_what_it_made(fresh: User) -> None:
    racers = [fresh.popen("start", name, "--runtime", "none", "--mount", "none") for name in ("ra", "rb")]
    told = [(racer.communicate(timeout=600)[1] or b"").decode() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], told
    assert sum(MAKES in text for text in told) == 1
    assert sum("which works on the warm image" in text for text in told) == 1
    assert len(warm_images(fresh)) == 1
    for name in ("ra", "rb"):
        assert sh(fresh, name, "hostname") == f"qvm-{name}"
    made = warm_images(fresh)[0]
    assert made["in_use"] and made["stage"] == "runtime"
    refused = fresh.qvm("image", "warm", "--rm", made["key"], check=False)
    assert refused.returncode == 1 and "in use" in refused.stderr
    for name in ("ra", "rb"):
        fresh.qvm("delete", name, "-f", "--data")
    fresh.qvm("image", "warm", "--rm")
    assert warm_images(fresh) == []


def test_a_killed_maker_leaves_nothing(fresh: User) -> None:
    maker = fresh.popen("image", "warm", "--runtime", "none")
    folder = Path(fresh.env["QVM_CACHE_HOME"]) / "warm"
    qemu = wait_for(lambda: machines(folder), 60, "QEMU of the warm image")
    maker.kill()
    maker.wait(10)
    wait_for(lambda: not machines(folder), 10, f"the end of {qemu}")
    assert warm_images(fresh) == []
    again = fresh.qvm("image", "warm", "--runtime", "none")
    assert MAKES in again.stderr
    assert [entry.name for entry in folder.iterdir() if entry.name.startswith(".")] == []
    assert list((Path(fresh.env["QVM_HOME"]) / "_runs").iterdir()) == []


def machines(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if "qemu-system" in line and str(folder) in line:
            found.append(f"{entry.name} {line[:60]}")
    return found


def test_a_qemu_that_dies_while_it_makes_one_gets_a_second_chance(fresh: User) -> None:
    maker = fresh.popen("image", "warm", "--runtime", "none")
    folder = Path(fresh.env["QVM_CACHE_HOME"]) / "warm"
    pid = int(wait_for(lambda: machines(folder), 60, "QEMU of the warm image")[0].split()[0])

    def busy() -> float:
        times = psutil.Process(pid).cpu_times()
        return times.user + times.system

    wait_for(lambda: busy() > 3, 60, "its guest boots")
    os.kill(pid, signal.SIGSEGV)
    out, err = maker.communicate(timeout=400)
    assert maker.returncode == 0, (out, err)
    assert b"QEMU ended while the warm image booted; it is booted once more" in err
    assert len(warm_images(fresh)) == 1


def test_ctrl_c_while_a_warm_image_is_made(fresh: User) -> None:
    start = fresh.popen("start", "ctrl", "--runtime", "none", "--mount", "none")
    folder = Path(fresh.env["QVM_CACHE_HOME"]) / "warm"
    wait_for(lambda: machines(folder), 60, "QEMU of the warm image")
    time.sleep(1)
    start.send_signal(signal.SIGINT)
    out, err = start.communicate(timeout=60)
    assert start.returncode == 130, (out, err)
    assert not machines(folder) and list(folder.glob(".*")) == []
    assert list((Path(fresh.env["QVM_HOME"]) / "_runs").iterdir()) == []
    wait_for(lambda: not fresh.processes(), 10, "the end of the supervisor that waited for its instance")


def test_settings_that_a_fork_cannot_take_make_another_warm_image(user: User) -> None:
    first = user.qvm("start", "shape", "--runtime", "none", "--mount", "none", "--cpus", "1")
    assert sh(user, "shape", "nproc") == "1"
    user.qvm("delete", "shape", "-f", "--data")
    again = user.qvm("start", "shape", "--runtime", "none", "--mount", "none", "--cpus", "1")
    assert MAKES not in again.stderr and "restore" in again.stderr, first.stderr + again.stderr
    user.qvm("delete", "shape", "-f", "--data")


def test_memory_and_disks_have_the_wished_size(user: User) -> None:
    sizes = ("--memory", "3", "--disk", "30", "--root-disk", "25")
    user.qvm("start", "big", "--runtime", "none", "--mount", "none", *sizes)
    total = int(sh(user, "big", "awk '/MemTotal/ {print $2}' /proc/meminfo"))
    assert 2.7 * 2**20 < total < 3 * 2**20

    def size(folder: str) -> int:
        return int(sh(user, "big", f"df -B1 --output=size {folder} | tail -1"))

    wait_for(lambda: size("/var/lib/qvm") > 28 << 30 and size("/") > 23 << 30, 30, "the file systems grow")
    user.qvm("stop", "big")
    user.qvm("start", "big")
    assert size("/var/lib/qvm") > 28 << 30 and size("/") > 23 << 30
    user.qvm("delete", "big", "-f", "--data")


def test_cold_is_cold(user: User) -> None:
    told = user.qvm("start", "icy", "--runtime", "none", "--mount", "none", "--cold").stderr
    assert "restore" not in told and MAKES not in told
    user.qvm("delete", "icy", "-f", "--data")


def test_a_rebooting_fork_comes_back(user: User) -> None:
    user.qvm("start", "reb", "--runtime", "none", "--mount", "none")
    before = user.status("reb")["pid"]
    soon = "sudo systemd-run --on-active=1 --timer-property=AccuracySec=100ms"
    sh(user, "reb", f"echo kept | sudo tee /root/kept; {soon} systemctl reboot")
    wait_for(lambda: user.status("reb").get("pid", before) != before, 60, "another QEMU")
    wait_for(lambda: user.status("reb")["state"] == "running", 120, "the VM is running again")
    assert sh(user, "reb", "sudo cat /root/kept") == "kept"
    user.qvm("delete", "reb", "-f", "--data")


def test_the_clock_is_right_in_a_fork(user: User) -> None:
    user.qvm("start", "clock", "--runtime", "none", "--mount", "none")
    before = time.time()
    guest = float(sh(user, "clock", "date +%s.%N"))
    assert before - 0.05 < guest < time.time() + 0.05
    user.qvm("delete", "clock", "-f", "--data")


@pytest.mark.parametrize(("name", "damage"), [("devices", "garbage"), ("ram", "zeros")])
def test_a_damaged_warm_image_means_a_cold_start_that_says_why(fresh: User, name: str, damage: str) -> None:
    fresh.qvm("image", "warm", "--runtime", "none")
    path = Path(warm_images(fresh)[0]["folder"]) / name
    size = path.stat().st_size
    with path.open("r+b") as file:
        if damage == "garbage":
            file.seek(4096)
            file.write(os.urandom(size - 4096))
        else:
            file.truncate(0)
            file.truncate(size)
    told = fresh.qvm("start", "hurt", "--runtime", "none", "--mount", "none").stderr
    assert "the warm image could not be used (" in told and "starting cold" in told
    assert sh(fresh, "hurt", "hostname") == "qvm-hurt"
    assert warm_images(fresh) == [], "it is not tried again"
    fresh.qvm("delete", "hurt", "-f", "--data")


def test_a_data_disk_that_outlived_its_vm_comes_back_whole(user: User) -> None:
    """Fill, kill, delete, start: nothing that was synced is lost, and the file system is clean."""
    fill = "sudo sh -c 'head -c 20000000 /dev/urandom > /var/lib/qvm/{0} && sync && sha256sum /var/lib/qvm/{0}'"
    sums: dict[str, str] = {}
    for number in range(ROUNDS):
        told = user.qvm("start", "data", "--runtime", "none", "--mount", "none").stderr
        assert "restore" in told, told
        for name, digest in sums.items():
            assert sh(user, "data", f"sudo sha256sum /var/lib/qvm/{name}").split()[0] == digest
        device = sh(user, "data", "findmnt -no SOURCE /var/lib/qvm")
        state = sh(user, "data", f"sudo dumpe2fs -h {device} 2>/dev/null | grep 'Filesystem state'")
        assert state.endswith("clean"), state
        assert "EXT4-fs error" not in sh(user, "data", "sudo dmesg")
        sums[f"f{number}"] = sh(user, "data", fill.format(f"f{number}")).split()[0]
        os.kill(user.status("data")["pid"], signal.SIGKILL)
        wait_for(lambda: user.status("data")["state"] == "stopped", 15, "it is stopped")
        user.qvm("delete", "data", "-f")
    assert len({entry["stage"] for entry in warm_images(user)}) == 2
    user.qvm("start", "data", "--runtime", "none", "--mount", "none")
    user.qvm("stop", "data")
    user.qvm("delete", "data", "-f", "--data")


def test_containers_on_a_data_disk_that_outlived_its_vm(user: User, busybox_tar: Path) -> None:
    user.qvm("start", "kept", "--runtime", "docker", "--mount", "none")
    user.docker("import", str(busybox_tar), "kept/busybox")
    user.docker("run", "--name", "one", "-v", "vol:/v", "kept/busybox", "sh", "-c", "echo there > /v/file")
    user.qvm("delete", "kept", "-f")
    told = user.qvm("start", "kept", "--runtime", "docker", "--mount", "none").stderr
    assert "restore" in told
    answer = user.docker("run", "--rm", "--pull=never", "-v", "vol:/v", "kept/busybox", "cat", "/v/file")
    assert answer.stdout == "there\n"
    assert "one" in user.docker("ps", "-a", "--format", "{{.Names}}").stdout
    user.qvm("delete", "kept", "-f", "--data")


def test_what_is_used_longest_ago_goes_when_there_is_too_much(fresh: User) -> None:
    fresh.qvm("image", "warm", "--runtime", "none")
    fresh.env["QVM_WARM_LIMIT"] = str(100 << 20)
    told = fresh.qvm("image", "warm", "--runtime", "none", "--base").stderr
    assert "removed the warm image" in told
    assert [entry["stage"] for entry in warm_images(fresh)] == ["base"]

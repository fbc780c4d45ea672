"""Suspend and resume, snapshots and copies of a real guest: what ran goes on, and nobody takes it for another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import QVM, User, fetch, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]

# Counts in memory alone, over a connection to itself, with a file open that has no name any more.
WORKER = """
import os, socket, time
here = socket.create_server(("127.0.0.1", 4555))
there = socket.create_connection(("127.0.0.1", 4555))
peer, _ = here.accept()
kept = open("/root/kept", "w+"); os.unlink("/root/kept")
count = 0
while True:
    count += 1
    there.sendall(b"%9d" % count)
    got = int(peer.recv(9, socket.MSG_WAITALL))
    kept.seek(0); kept.write(str(got)); kept.flush(); kept.seek(0)
    with open("/run/worker.new", "w") as file:
        file.write(f"{os.getpid()} {kept.read()} {time.time()}")
    os.rename("/run/worker.new", "/run/worker")
    time.sleep(0.05)
"""


def sh(user: User, profile: str, script: str) -> str:
    """Run in /, for a session begins in the mounted working directory and would hold it."""
    return user.qvm("ssh", profile, "--", f"cd /; {script}", timeout=90).stdout.strip()


def worker(user: User, profile: str = "dev") -> tuple[int, int, float]:
    """Pid, count and clock of the worker, which has counted on since we began to ask."""
    pid, first, _ = sh(user, profile, "cat /run/worker").split()

    def later() -> list[str] | None:
        words = sh(user, profile, "cat /run/worker").split()
        return words if len(words) == 3 and int(words[1]) > int(first) else None

    words = wait_for(later, 20, "the worker counts on")
    assert words[0] == pid
    return int(words[0]), int(words[1]), float(words[2])


def start_worker(user: User, profile: str = "dev") -> int:
    user.qvm("ssh", profile, "--", "cat > /root/worker.py", input=WORKER.encode())
    sh(user, profile, "rm -f /run/worker; setsid python3 /root/worker.py </dev/null >/root/worker.log 2>&1 &")
    wait_for(lambda: sh(user, profile, "cat /run/worker || true"), 60, "the worker begins")
    return worker(user, profile)[0]


def clock_offset(user: User, profile: str) -> float:
    """Seconds between the guest's clock and ours, at most: what lies between our asking and its answer counts too."""
    before = time.time()
    theirs = float(sh(user, profile, "date +%s.%N"))
    return max(before - theirs, theirs - time.time(), 0.0)


@pytest.fixture(scope="module")
def dev(user: User, busybox_tar: Path) -> User:
    user.qvm("start", "dev", "--runtime", "docker", "--cpus", "2", "--memory", "2", "--disk", "20",
             "--mount", f"{user.work}:/mnt/work")
    user.docker("import", "-c", 'CMD ["/bin/sh"]', str(busybox_tar), "busybox:test")
    user.docker("run", "-d", "--name", "web", "-p", "8086:80", "busybox:test", "httpd", "-f", "-p", "80", "-h", "/www")
    user.docker("run", "-d", "--name", "counter", "busybox:test", "sh", "-c",
                "n=0; while :; do n=$((n+1)); echo $n; sleep 0.2; done")
    start_worker(user)
    return user


def counted(user: User) -> int:
    return int(user.docker("logs", "--tail", "1", "counter").stdout.strip() or 0)


def test_everything_goes_on_after_suspend_and_resume(dev: User) -> None:
    pid, count, _ = worker(dev)
    container, numbers = dev.docker("inspect", "-f", "{{.Id}} {{.State.StartedAt}}", "counter").stdout, counted(dev)
    began = time.monotonic()
    done = json.loads(dev.qvm("suspend", "dev", "--json").stdout)["result"]
    assert done["changed"] and time.monotonic() - began < 20
    assert dev.status("dev")["state"] == "suspended" and not [line for line in dev.processes() if "settle" not in line]
    again = dev.qvm("suspend", "dev")
    assert "already" in again.stderr + again.stdout
    assert fetch(8086) is None
    (dev.work / "from host").write_text("written while it slept")
    time.sleep(3)
    resumed = dev.qvm("resume", "dev")
    assert "cold" not in resumed.stderr
    assert dev.status("dev")["state"] == "running"
    assert clock_offset(dev, "dev") < 0.25
    new_pid, new_count, clock = worker(dev)
    assert new_pid == pid and count < new_count < count + 1200 and abs(clock - time.time()) < 5
    assert dev.docker("inspect", "-f", "{{.Id}} {{.State.StartedAt}}", "counter").stdout == container
    assert wait_for(lambda: counted(dev) > numbers, 20, "the container counts on")
    assert wait_for(lambda: fetch(8086), 20, "port 8086") == "hello from a container\n"
    assert sh(dev, "dev", "cat '/mnt/work/from host'; echo back >/mnt/work/back") == "written while it slept"
    assert (dev.work / "back").read_text() == "back\n"
    folder = Path(dev.env["QVM_HOME"]) / "_instances" / "dev"
    assert not (folder / "suspended" / "manifest.json").exists(), "a state is used once"


def test_stop_suspend_and_start_do_the_same_and_again(dev: User) -> None:
    pid = worker(dev)[0]
    for _ in range(2):
        dev.qvm("stop", "dev", "--suspend")
        assert "cold" not in dev.qvm("start", "dev").stderr
        assert worker(dev)[0] == pid


def test_who_holds_a_host_folder_is_named_and_goes_on(dev: User) -> None:
    pid = worker(dev)[0]
    sh(dev, "dev", "cd /mnt/work && exec setsid sleep 1234 </dev/null >/dev/null 2>&1 &")
    refused = dev.qvm("suspend", "dev", check=False)
    assert refused.returncode == 1 and "(sleep)" in refused.stderr and "/mnt/work" in refused.stderr
    sh(dev, "dev", "pkill -f 'sleep 1234'")
    dev.docker("run", "-d", "--name", "holder", "-v", "/mnt/work:/in", "busybox:test", "sleep", "999")
    identifier = dev.docker("inspect", "-f", "{{.Id}}", "holder").stdout[:12]
    refused = dev.qvm("snapshot", "create", "dev", "no", check=False)
    assert refused.returncode == 1 and f"container {identifier}" in refused.stderr
    assert dev.status("dev")["state"] == "running" and worker(dev)[0] == pid
    assert dev.docker("exec", "holder", "ls", "/in").returncode == 0
    dev.docker("rm", "-f", "holder")
    assert json.loads(dev.qvm("snapshot", "list", "dev", "--json").stdout)["result"] == []


def test_settings_a_suspended_machine_cannot_take_on_are_refused(dev: User) -> None:
    dev.qvm("suspend", "dev")
    refused = dev.qvm("start", "dev", "--cpus", "1", check=False)
    assert refused.returncode == 1 and "cpus" in refused.stderr and "--cold" in refused.stderr
    assert dev.status("dev")["state"] == "suspended"
    dev.qvm("resume", "dev")
    worker(dev)


def test_snapshots_of_a_running_machine(dev: User) -> None:
    pid, count, _ = worker(dev)
    made = json.loads(dev.qvm("snapshot", "create", "dev", "before", "--json").stdout)["result"]
    print("create:", made)
    taken = dev.qvm("snapshot", "create", "dev", "before", check=False)
    assert taken.returncode == 1 and "already" in taken.stderr
    assert worker(dev)[0] == pid, "it runs on"
    sh(dev, "dev", f"kill {pid}; echo lost >/root/lost; sync")
    dev.docker("rm", "-f", "counter")
    dev.qvm("snapshot", "create", "dev", "after")
    randoms = []
    for _ in range(2):
        restored = dev.qvm("snapshot", "restore", "dev", "before")
        assert "cold" not in restored.stderr
        randoms.append(sh(dev, "dev", "head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid"))
        new_pid, new_count, _ = worker(dev)
        assert new_pid == pid and count <= new_count < count + 1200
        assert sh(dev, "dev", "ls /root") == "worker.log\nworker.py"
        assert dev.docker("inspect", "-f", "{{.State.Running}}", "counter").stdout.strip() == "true"
    assert randoms[0] != randoms[1]
    assert clock_offset(dev, "dev") < 0.25
    listed = json.loads(dev.qvm("snapshot", "list", "dev", "--json").stdout)["result"]
    assert [(row["name"], row["running"]) for row in listed] == [("before", True), ("after", True)]
    assert "before" in dev.qvm("snapshot", "list", "dev").stdout


def layers(user: User) -> list[str]:
    home = Path(user.env["QVM_HOME"])
    folders = (home / "_instances" / "dev" / "layers", home / "_data" / "dev.layers")
    return sorted(path.name for folder in folders if folder.exists() for path in folder.iterdir())


def test_snapshots_are_forgotten_while_the_machine_runs(dev: User) -> None:
    before = layers(dev)
    dev.qvm("snapshot", "delete", "dev", "after")
    dev.qvm("snapshot", "delete", "dev", "before")
    wait_for(lambda: len(layers(dev)) == 2, 120, f"layers merged: {before}")
    worker(dev)
    assert sh(dev, "dev", "cat /root/worker.py | wc -l") == str(len(WORKER.splitlines()))
    missing = dev.qvm("snapshot", "restore", "dev", "before", check=False)
    assert missing.returncode == 3


def test_a_copy_of_a_running_machine_is_another_one(dev: User) -> None:
    pid = worker(dev)[0]
    made = json.loads(dev.qvm("clone", "dev", "twin", "--json").stdout)["result"]
    assert made["running"]
    assert worker(dev)[0] == pid
    started = dev.qvm("start", "twin")
    assert "cold" not in started.stderr
    assert worker(dev, "twin")[0] == pid and worker(dev)[0] == pid
    ask = ("hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id /sys/class/net/eth0/address; "
           "cut -d' ' -f2 /etc/ssh/ssh_host_ed25519_key.pub; head -c 16 /dev/urandom | od -An -tx1; "
           "docker info -f '{{.ID}}'")  # fmt: skip
    mine, theirs = sh(dev, "dev", ask).splitlines(), sh(dev, "twin", ask).splitlines()
    assert len(mine) == len(theirs) == 7 and not set(mine) & set(theirs)
    assert theirs[0] == "qvm-twin"
    sh(dev, "twin", "echo only here >/root/twin; sync")
    assert "twin" not in sh(dev, "dev", "ls /root")
    assert dev.docker("ps", "-q", "--filter", "name=counter").stdout.strip()
    taken = dev.qvm("clone", "dev", "twin", check=False)
    assert taken.returncode == 1 and "already" in taken.stderr


def test_a_copy_lives_on_without_its_source_and_boots(dev: User) -> None:
    dev.qvm("stop", "twin")
    clone = json.loads(dev.qvm("clone", "twin", "third", "--json").stdout)["result"]
    assert not clone["running"]
    dev.qvm("delete", "twin", "-f", "--data")
    dev.qvm("start", "third")
    assert sh(dev, "third", "hostname; cat /root/twin") == "qvm-third\nonly here"
    dev.qvm("delete", "third", "-f", "--data")
    worker(dev)


def test_qemu_killed_while_it_is_suspended_starts_cold(dev: User) -> None:
    sh(dev, "dev", "echo synced >/root/synced; sync")
    folder = Path(dev.env["QVM_HOME"]) / "_instances" / "dev"
    for who in ("pid", "supervisor_pid"):
        victim = dev.status("dev")[who]
        suspending = dev.popen("suspend", "dev")
        wait_for((folder / ".suspended.partial").exists, 60, "it began")
        os.kill(victim, signal.SIGKILL)
        assert suspending.wait(60) != 0
        if who == "supervisor_pid":  # the machine runs on, perhaps paused, with nobody to serve it
            dev.qvm("stop", "dev", "-f")
        started = dev.qvm("start", "dev")
        assert sh(dev, "dev", "cat /root/synced") == "synced", started.stderr
        assert not (folder / ".suspended.partial").exists() or not (folder / "suspended").exists()
        dev.qvm("suspend", "dev")
        assert not (folder / ".suspended.partial").exists()
        dev.qvm("resume", "dev")


def test_a_supervisor_killed_while_it_saves_leaves_a_machine_that_goes_on(dev: User) -> None:
    pid = start_worker(dev)
    saving = dev.popen("snapshot", "create", "dev", "half")
    partial = Path(dev.env["QVM_HOME"]) / "_instances" / "dev" / "snapshots" / ".half.partial"
    wait_for(partial.exists, 60, "it began")
    os.kill(dev.status("dev")["supervisor_pid"], signal.SIGKILL)
    assert saving.wait(60) != 0
    dev.qvm("start", "dev")
    assert worker(dev)[0] == pid
    assert sh(dev, "dev", "grep -c ' /mnt/work 9p ' /proc/mounts") == "1"
    assert json.loads(dev.qvm("snapshot", "list", "dev", "--json").stdout)["result"] == []
    dev.qvm("snapshot", "create", "dev", "half")
    dev.qvm("snapshot", "delete", "dev", "half")
    assert not partial.exists()


def test_a_damaged_state_starts_cold_and_says_why(dev: User) -> None:
    dev.qvm("suspend", "dev")
    ram = Path(dev.env["QVM_HOME"]) / "_instances" / "dev" / "suspended" / "ram"
    os.truncate(ram, 1 << 20)
    started = dev.qvm("start", "dev")
    assert "cut short" in started.stderr and "starting cold" in started.stderr
    assert sh(dev, "dev", "cat /root/synced") == "synced"
    assert not ram.parent.exists()


def test_cold_gives_up_what_was_suspended(dev: User) -> None:
    start_worker(dev)
    dev.qvm("suspend", "dev")
    started = dev.qvm("start", "dev", "--cold")
    assert "gave up" in started.stderr
    assert sh(dev, "dev", "cat /run/worker 2>/dev/null || echo none") == "none"


def test_the_data_disk_outlives_an_instance_with_snapshots(dev: User) -> None:
    dev.docker("volume", "create", "kept")
    dev.docker("run", "--rm", "-v", "kept:/v", "busybox:test", "sh", "-c", "echo precious >/v/file")
    dev.qvm("snapshot", "create", "dev", "one")
    dev.docker("run", "--rm", "-v", "kept:/v", "busybox:test", "sh", "-c", "echo more >>/v/file")
    dev.qvm("delete", "dev", "-f")
    disk = Path(dev.env["QVM_HOME"]) / "_data" / "dev.qcow2"
    assert disk.is_file() and not disk.is_symlink()
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", disk], check=True)
    dev.qvm("start", "dev", "--runtime", "docker", "--mount", "none")
    said = dev.docker("run", "--rm", "-v", "kept:/v", "busybox:test", "cat", "/v/file").stdout
    assert said == "precious\nmore\n"


def test_the_api_forks_and_restores(dev: User) -> None:
    script = """
import qvm
vm = qvm.get("dev")
vm.run(["sh", "-c", "echo one >/run/memory"])
name = vm.snapshot()
vm.run(["sh", "-c", "echo two >/run/memory"])
other = vm.fork("api-fork")
print(other.run(["cat", "/run/memory"]).stdout.strip(), other.status()["hostname"])
vm.restore(name)
print(vm.run(["cat", "/run/memory"]).stdout.strip(), [row["name"] for row in vm.snapshots()] == [name])
vm.delete_snapshot(name)
vm.suspend()
print(vm.status()["state"])
vm.resume()
print(vm.run(["cat", "/run/memory"]).stdout.strip())
other.delete(data=True)
"""
    done = dev.run(str(QVM.with_name("python")), "-c", script)
    assert done.stdout.splitlines() == ["two qvm-api-fork", "one True", "suspended", "one"]

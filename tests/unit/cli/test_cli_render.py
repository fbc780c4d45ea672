"""Results as people see them."""

from __future__ import annotations

from qvm.cli import render
from qvm.commands.results import DeleteResult, StartResult, StopResult
from qvm.units import GiB, MiB

STATUS = {
    "profile": "dev", "state": "running", "uptime": 185.0, "arch": "x86_64", "accel": "tcg", "cpus": 2,
    "memory": 4 * GiB, "memory_used": 700 * MiB, "disk": 100 * GiB, "disk_used": 3 * GiB, "image": "debian-13",
    "runtime": "docker", "runtime_version": "docker 26.1.5", "user": "me", "ssh_port": 40022,
    "mounts": [
        {"source": "/home/me/src", "target": "/home/me/src", "writable": True},
        {"source": "/data", "target": "/mnt/data", "writable": False},
    ],
    "sockets": {"docker": "/home/me/.qvm/dev/docker.sock"}, "requirements": {"agent": "done"},
    "notes": ["KVM is unusable"], "forwards": [
        {"guest": "[::]:80", "host": "127.0.0.1:80", "port": 80, "state": "denied", "reason": "needs root"},
        {"guest": "0.0.0.0:8080", "host": "127.0.0.1:8080", "port": 8080, "state": "forwarding", "reason": ""},
    ],
}  # fmt: skip


def test_status() -> None:
    assert render.render_status(STATUS) == (
        "dev is running for 3 min 05 s\n"
        "  runtime  docker 26.1.5\n"
        "  machine  x86_64, tcg, 2 CPUs, 4 GiB\n"
        "  memory   700 MiB of 4 GiB used on the host\n"
        "  disk     3 GiB of 100 GiB used on the host\n"
        "  image    debian-13\n"
        "  ssh      me@127.0.0.1:40022\n"
        "  mount    /home/me/src\n"
        "           /data at /mnt/data (read-only)\n"
        "  socket   /home/me/.qvm/dev/docker.sock\n"
        "  port     127.0.0.1:80 (denied: needs root)\n"
        "           127.0.0.1:8080\n"
        "  note     KVM is unusable"
    )


def test_status_lists_the_platforms_that_are_emulated() -> None:
    text = render.render_status({**STATUS, "binfmt": ["linux/arm/v7", "linux/arm64"]})
    assert "\n  emulates  linux/arm/v7, linux/arm64\n" in text
    for nothing in ([], None):
        assert "emulates" not in render.render_status({**STATUS, "binfmt": nothing})


def test_status_of_one_that_starts_says_what_it_waits_for() -> None:
    requirements = {"qemu": "done", "ssh": "waiting"}
    text = render.render_status({"profile": "d", "state": "starting", "requirements": requirements})
    assert text == "d is starting\n  waits for  ssh (waiting)"


def test_list() -> None:
    assert render.render_list([]) == "There are no VMs; `qvm start` makes one."
    damaged = {"profile": "broken-one", "state": "damaged", "error": "x"}
    assert render.render_list([STATUS, damaged]).splitlines() == [
        "PROFILE     STATE    RUNTIME  ARCH    ACCEL  CPUS  MEMORY  DISK",
        "dev         running  docker   x86_64  tcg    2     4 GiB   100 GiB",
        "broken-one  damaged",
    ]


def test_news() -> None:
    again = StartResult("dev", changed=False, status=STATUS, notes=[], seconds=0.1)
    assert render.render_start(again) == "dev is running already"
    assert render.render_stop(StopResult("dev", changed=True, how="powerdown", seconds=2.0)) == (
        "dev stopped after 2.0 s (powerdown)"
    )
    assert render.render_stop(StopResult("dev", changed=False, how="", seconds=0)) == "dev is stopped already"
    assert render.render_delete(DeleteResult("dev", ["/x"])) == "dev is deleted"

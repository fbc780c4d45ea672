"""The same on QEMU 10: freeze, fork, mount, exec, port, graceful stop, and the start after it."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import pytest
from conftest import TOOLS, User, fetch, wait_for

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def modern(user: User, cache_home: Path) -> User:
    folder = cache_home / "test-tools" / "qemu10"
    subprocess.run([TOOLS / "fetch-qemu10.sh", folder], check=True, capture_output=True, timeout=600)
    user.env["QVM_QEMU"] = str(folder / "bin")
    return user


def test_whole_life_on_qemu_10(modern: User) -> None:
    (modern.work / "index.html").write_text("from the host\n")
    told = modern.qvm("start", "ten", "--runtime", "none", "--network-address").stderr
    assert "restore: done" in told and "starting cold" not in told, "it is a fork"
    assert "10." in modern.qvm("version").stdout
    pid = modern.status("ten")["pid"]
    assert str(Path(modern.env["QVM_QEMU"]).parent) in str(Path(f"/proc/{pid}/exe").readlink())
    serve = 'sudo systemd-run --unit=web --working-directory="$PWD" python3 -m http.server 8099'
    modern.qvm("ssh", "ten", "--", serve)
    assert wait_for(lambda: fetch(8099), 30, "the guest's web server on a mounted folder") == "from the host\n"
    assert modern.status("ten")["network"]["address"] == "10.71.86.2"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as neighbour:
        neighbour.bind(f"{modern.env['QVM_HOME']}/_net/9.q")
        neighbour.settimeout(30)
        modern.qvm("ssh", "ten", "--", "ping -c 1 -W 1 10.71.86.9", check=False)
        while (frame := neighbour.recv(65536))[12:14] != b"\x08\x06":
            continue  # IPv6 introduces itself too
        assert frame[6:12].hex(":") == "52:54:00:71:86:02", "it asks for the other's card"
    modern.qvm("stop", "ten")
    assert modern.processes() == []
    modern.qvm("start", "ten")
    assert modern.status("ten")["state"] == "running"
    modern.qvm("delete", "ten", "-f", "--data")

"""What of the agent depends on the guest's architecture: numbers of ioctls, and the emulation of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from guest_agent import load_agent

from qvm.arch import platforms


@pytest.fixture
def agent() -> Any:
    return load_agent()


def test_ioctls_have_the_kernels_numbers_on_power_too(agent: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel's headers make them: random(4), linux/fs.h, fs/ext4/ext4.h."""
    wanted = {("w", "R", 3, 8): (0x40085203, 0x80085203), ("", "R", 7, 0): (0x5207, 0x20005207),
              ("w", "f", 16, 8): (0x40086610, 0x80086610), ("r", "\x12", 114, 8): (0x80081272, 0x40081272),
              ("r", "\x12", 114, 4): (0x80041272, 0x40041272)}  # fmt: skip
    for power in (False, True):
        monkeypatch.setattr(agent, "POWER", power)
        assert [agent.ioctl_number(*words) for words in wanted] == [numbers[power] for numbers in wanted.values()]


def test_emulators_that_are_on(agent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent, "BINFMT", str(tmp_path / "gone"))
    assert agent.emulators() == []
    monkeypatch.setattr(agent, "BINFMT", str(tmp_path))
    for name, text in (("qemu-aarch64", "enabled\ninterpreter /usr/bin/qemu-aarch64\n"), ("qemu-arm", "disabled\n"),
                       ("qemu-s390x", "enabled\n"), ("python3.13", "enabled\n"), ("status", "enabled\n")):
        (tmp_path / name).write_text(text)
    assert agent.emulators() == ["qemu-aarch64", "qemu-s390x"]


def test_emulation_is_switched_by_the_unit_and_the_kernel(
    agent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    exists = agent.os.path.exists
    monkeypatch.setattr(agent, "BINFMT", str(tmp_path))
    monkeypatch.setattr(agent, "run_program", ran.append)
    monkeypatch.setattr(agent.os.path, "exists", lambda path: "qvm-binfmt" in str(path) or exists(path))
    monkeypatch.setattr(agent.os.path, "isdir", lambda path: True)
    entry = tmp_path / "qemu-aarch64"
    entry.write_text("enabled\n")
    assert agent.set_emulation(True) == {"emulators": ["qemu-aarch64"]}
    assert ran == [["systemctl", "start", "qvm-binfmt.service"]]
    assert agent.set_emulation(False) == {"emulators": []}
    assert entry.read_text().startswith("-1"), "the kernel takes an entry out when it is told so"
    entry.unlink()
    ran.clear()
    agent.set_emulation(True)
    assert ran == [["systemctl", word, "qvm-binfmt.service"] for word in ("start", "restart")]


def test_platforms_of_emulators() -> None:
    assert platforms(["qemu-aarch64", "qemu-arm", "qemu-i386", "qemu-ppc64le", "qemu-riscv64", "qemu-s390x",
                      "qemu-hexagon"]) == [
        "linux/386", "linux/arm/v7", "linux/arm64", "linux/ppc64le", "linux/riscv64", "linux/s390x"]  # fmt: skip

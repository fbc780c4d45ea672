"""A folder with a machine made of the stub QEMU, for the tests of its process and of its monitor."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from stub_qemu import write_stub

from qvm.config.model import Mount
from qvm.instance.spec import Disk, InstanceSpec, KernelBoot
from qvm.process import Identity, kill
from qvm.qemu.features import QemuFeatures
from qvm.qemu.machine import start_qemu
from qvm.units import GiB

UUID = "0b54d1c2-53b6-4f6e-8f0b-4d7d6f1f7a11"


def make_spec(folder: Path) -> InstanceSpec:
    return InstanceSpec(
        name="stub", uuid=UUID, arch="x86_64", accel="tcg", cpus=1, memory=GiB,
        disks=(Disk(folder / "root.qcow2", "root"),), mounts=(Mount(folder, PurePosixPath("/mnt")),),
        mac="52:54:00:00:00:01", ssh_port=40022, monitor_socket=folder / "qmp.sock", agent_socket=folder / "agent.sock",
        stream_socket=folder / "stream.sock", serial_log=folder / "serial.log",
        boot=KernelBoot(folder / "vmlinuz", folder / "initrd", "console=ttyS0"),
    )


def make_features(binary: Path) -> QemuFeatures:
    return QemuFeatures(
        binary=binary, build="stub", arch="x86_64", system="Linux", host_machine="x86_64", version=(7, 2, 0),
        package="", machine="pc-q35-7.2", accels=("tcg",), devices=("virtio-9p-pci",), properties=(), netdevs=("user",),
        sandbox=False, io_uring=False,
    )


class Place:
    """A folder for one machine, and the machine."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.spec = make_spec(folder)
        self.features = make_features(write_stub(folder))
        self.log = folder / "qemu.log"
        self.started: list[Identity] = []
        self._monkeypatch = monkeypatch

    def manners(self, words: str) -> None:
        self._monkeypatch.setenv("QVM_STUB", words)

    def start(self, words: str = "", *, timeout: float = 10.0) -> Identity:
        self.manners(words)
        identity = start_qemu(self.spec, self.features, log=self.log, timeout=timeout)
        self.started.append(identity)
        return identity

    def bare_argv(self) -> list[str]:
        """The stub with only what it needs, its monitor at `folder`/monitor: for one that `start` would end."""
        sockets = [
            word for name in ("agent", "stream", "monitor")
            for word in ("-chardev", f"socket,id={name},path={self.folder / name}")
        ]
        return [str(self.features.binary), "-uuid", UUID, *sockets,
                "-chardev", f"file,id=console,path={self.spec.serial_log}"]


def open_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The body of a fixture; what was started is ended, and nothing may be left."""
    made = Place(folder, monkeypatch)
    yield made
    for identity in made.started:
        kill(identity, signal.SIGKILL)
    assert not stubs_in(made.folder), "a test left a process behind"


def stubs_in(folder: Path) -> list[int]:
    """Processes whose command line names `folder`, zombies excluded."""
    found = []
    for _ in range(40):
        found = [
            int(entry.name) for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and int(entry.name) != os.getpid() and names(entry, folder)
        ]
        if not found:
            return []
        time.sleep(0.05)
    return found


def names(entry: Path, folder: Path) -> bool:
    try:
        return os.fsencode(folder) in (entry / "cmdline").read_bytes()
    except OSError:
        return False

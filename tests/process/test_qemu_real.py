"""Every QEMU of this host takes our command lines, whole: started, asked, plugged, ended. The guest is a loop.

Runs on the installed QEMU, and on a second one where QVM_TEST_QEMU10 names its folder (`make test` sees to it).
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import pytest

from qvm.arch import ALL, find_arch
from qvm.config.model import Mount
from qvm.errors import InstanceStateError, PortTakenError, QemuError
from qvm.filenames import MAX_SOCKET_PATH
from qvm.instance.spec import Disk, InstanceSpec, KernelBoot
from qvm.process import Identity, is_alive, kill
from qvm.qemu.bus import virtio
from qvm.qemu.features import QemuFeatures
from qvm.qemu.machine import start_qemu, stop_qemu
from qvm.qemu.monitor import Monitor
from qvm.qemu.packages import qemu_hint
from qvm.qemu.probe import find_qemu, probe_qemu
from qvm.qemu.probe_monitor import probe_monitor
from qvm.units import MiB

UUID = "5a4f0a53-64cf-4c7d-9d0c-2b6f3a2f9a01"
MOUNTS = ("plain", "with space, comma=equals", "Müller 日本", *(f"m{number}" for number in range(7)))


# Instructions that wait for ever (wfi where there is one, and a jump back) of a kernel that is a bare image.
_IDLE = {
    "aarch64": struct.pack("<II", 0xD503207F, 0x17FFFFFF),
    "armv7l": struct.pack("<II", 0xE320F003, 0xEAFFFFFD),
    "riscv64": struct.pack("<II", 0x10500073, 0xFFDFF06F),
    "s390x": bytes(0x10000) + bytes.fromhex("a7f40000"),  # entered at 64 KiB
}


def idle_kernel(arch: str) -> bytes:
    """A kernel that waits for ever: for x86 a boot sector of the Linux boot protocol (Documentation/arch/x86/boot.rst)
    that halts in real mode, for POWER an ELF file, elsewhere a few instructions."""
    if arch in _IDLE:
        return _IDLE[arch].ljust(4096, b"\0")
    if arch == "ppc64le":
        header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 21, 1, 0x1000, 64, 0, 2, 64, 56, 1, 0,
                             0, 0)
        load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 4100, 4100, 4096)
        return (header + load).ljust(4096, b"\0") + struct.pack("<I", 0x48000000)
    image = bytearray(8192)
    image[0x1F1] = 1  # one sector of setup code
    struct.pack_into("<H", image, 0x1FE, 0xAA55)
    image[0x200:0x202] = b"\xeb\x68"  # jmp to 0x26a, over the header
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x020C)
    image[0x211] = 1  # the rest is loaded at 1 MiB
    struct.pack_into("<I", image, 0x22C, 0x7FFFFFFF)  # highest address for the initramfs
    image[0x26A:0x26D] = b"\xf4\xeb\xfd"  # hlt; jmp back
    return bytes(image)


@dataclass
class Bench:
    """A folder with everything a machine needs, and the QEMU to try it with."""

    folder: Path
    features: QemuFeatures
    spec: InstanceSpec
    started: list[Identity]

    @property
    def log(self) -> Path:
        return self.folder / "qemu.log"

    def start(self) -> Identity:
        identity = start_qemu(self.spec, self.features, log=self.log)
        self.started.append(identity)
        return identity


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_disk(path: Path) -> Path:
    """An empty qcow2 of 64 MiB, header only as the format's specification has it (docs/interop/qcow2.txt)."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "64M"], check=True)
    return path


def make_spec(folder: Path, arch: str) -> InstanceSpec:
    (folder / "vmlinuz").write_bytes(idle_kernel(arch))
    (folder / "initrd").write_bytes(bytes(512))
    (folder / "seed.iso").write_bytes(bytes(65536))
    for name in MOUNTS:
        (folder / "mounts" / name).mkdir(parents=True)
    return InstanceSpec(
        name="bench", uuid=UUID, arch=arch, accel="tcg", cpus=2, memory=256 * MiB,
        disks=(
            Disk(make_disk(folder / "root,1.qcow2"), "root"),
            Disk(make_disk(folder / "data.qcow2"), "data"),
            Disk(folder / "seed.iso", "seed", format="raw", readonly=True),
        ),
        mounts=tuple(
            Mount(folder / "mounts" / name, PurePosixPath("/") / name, writable=number != 1)
            for number, name in enumerate(MOUNTS)
        ),
        mac="52:54:00:00:00:02", ssh_port=free_port(), monitor_socket=folder / "qmp.sock",
        agent_socket=folder / "agent.sock", stream_socket=folder / "stream.sock", serial_log=folder / "serial.log",
        boot=KernelBoot(folder / "vmlinuz", folder / "initrd", "console=none"),
    )


@pytest.fixture(params=[f"{arch.name}-{which}" for arch in ALL for which in ("installed", "qemu10")])
def bench(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    name, _, which = str(request.param).partition("-")
    arch = find_arch(name)
    assert arch is not None
    if which == "qemu10":
        other = os.environ.get("QVM_TEST_QEMU10")
        if not other:
            pytest.skip("tests/tools/fetch-qemu10.sh FOLDER, then QVM_TEST_QEMU10=FOLDER/bin")
        monkeypatch.setenv("QVM_QEMU", other)
    if find_qemu(arch) is None:
        pytest.skip(f"{arch.qemu_binary} is missing: {qemu_hint(arch)}")
    with tempfile.TemporaryDirectory(prefix="qvm-") as text:  # pytest's own folders are too long for sockets
        folder = Path(text)
        monkeypatch.setenv("QVM_CACHE_HOME", str(folder / "cache"))
        made = Bench(folder, probe_qemu(arch), make_spec(folder, name), [])
        yield made
        for identity in made.started:
            kill(identity, signal.SIGKILL)
            asyncio.run(stop_qemu(identity, None))


def test_a_whole_machine(bench: Bench) -> None:
    """Three disks, ten mounts, sockets, sandbox; answers, and goes when told."""
    began = time.monotonic()
    identity = bench.start()
    assert time.monotonic() - began < 20
    info = probe_monitor(bench.spec.monitor_socket)
    assert info is not None and (info.uuid, info.status) == (UUID, "running")
    sockets = [bench.spec.monitor_socket, bench.spec.agent_socket, bench.spec.stream_socket]
    assert [stat.S_IMODE(path.stat().st_mode) for path in sockets] == [0o600] * 3
    assert stat.S_IMODE(bench.spec.serial_log.stat().st_mode) == 0o600
    status = Path(f"/proc/{identity.pid}/status").read_text()
    assert "Name:\tqvm-bench" in status
    if bench.features.sandbox:
        assert "Seccomp:\t2" in status
    with socket.create_connection(("127.0.0.1", bench.spec.ssh_port), timeout=2):
        pass
    rung, took = asyncio.run(end(bench, identity))
    assert rung == "quit", "this guest hears no power button"
    assert took < 4 and not is_alive(identity)
    # Anything but the command line is a warning about it.
    words = [line for line in bench.log.read_text().splitlines() if UUID not in line]
    assert not [line for line in words if "terminating on signal" not in line], words


async def end(bench: Bench, identity: Identity) -> tuple[str, float]:
    monitor = await Monitor.connect(bench.spec.monitor_socket)
    began = time.monotonic()
    rung = await stop_qemu(identity, monitor, powerdown_timeout=0.3)
    took = time.monotonic() - began
    await monitor.close()
    return rung, took


def test_uefi_and_its_variables(bench: Bench) -> None:
    firmware = bench.features.firmware
    if firmware is None:
        pytest.skip("UEFI firmware is missing: apt install ovmf qemu-efi-aarch64")
    variables = bench.folder / "efivars.fd"
    bench.spec = replace(bench.spec, boot=None, firmware_vars=variables)
    bench.start()
    assert stat.S_IMODE(variables.stat().st_mode) == 0o600
    assert variables.stat().st_size == firmware.variables.stat().st_size


def test_memory_as_a_file(bench: Bench) -> None:
    bench.spec = replace(bench.spec, ram_file=bench.folder / "ram")
    bench.start()
    assert bench.spec.ram_file is not None
    info = bench.spec.ram_file.stat()
    assert (info.st_size, stat.S_IMODE(info.st_mode)) == (256 * MiB, 0o600)


def test_plugging(bench: Bench) -> None:
    """A disk, a network card and (where the machine can) memory, while it runs."""
    bench.start()

    async def plug() -> None:
        monitor = await Monitor.connect(bench.spec.monitor_socket)
        disk = make_disk(bench.folder / "more.qcow2")
        await monitor.blockdev_add({"driver": "qcow2", "node-name": "disk-more",
                                    "file": {"driver": "file", "filename": str(disk)}})
        arch = find_arch(bench.spec.arch)
        assert arch is not None
        bus = {"pcie": "port0", "pci": "pci.0"}.get(arch.bus)
        where = {"bus": bus} if bus else {}
        await monitor.device_add(virtio("blk", arch.bus), "drive-more", **where, drive="disk-more", serial="more")
        await monitor.device_add(virtio("net", arch.bus), "nic7", **({"bus": "port7"} if bus == "port0" else where))
        if bench.spec.arch == "x86_64":
            await monitor.object_add("memory-backend-ram", "mem1", size=128 * MiB)
            await monitor.device_add("pc-dimm", "dimm1", memdev="mem1")
        with pytest.raises(QemuError, match="refused device_add"):
            await monitor.device_add(virtio("net", arch.bus), "drive-more", **where)
        assert "drive-more" in await monitor.human("info qtree")
        # PCIe's own hot-plug lets go at once where the guest drives no slot; the others wait for a real guest.
        if arch.bus == "pcie" and arch.name != "x86_64":
            await monitor.device_del("drive-more", timeout=5)
            assert "drive-more" not in await monitor.human("info qtree")
            await monitor.blockdev_del("disk-more")
        assert len(await monitor.execute("query-qmp-schema")) > 500
        await monitor.close()

    asyncio.run(plug())


def test_a_taken_port(bench: Bench) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", bench.spec.ssh_port))
        other.listen()
        with pytest.raises(PortTakenError, match=str(bench.spec.ssh_port)) as caught:
            bench.start()
    assert "hostfwd" in (caught.value.details or "")
    assert not list(bench.folder.glob("*.sock"))
    bench.start()


def test_a_disk_in_use_and_a_disk_that_is_gone(bench: Bench) -> None:
    bench.start()
    second = replace(bench.spec, ssh_port=free_port(), monitor_socket=bench.folder / "q2.sock",
                     agent_socket=bench.folder / "a2.sock", stream_socket=bench.folder / "s2.sock")
    with pytest.raises(InstanceStateError, match="another process uses this instance's disks"):
        start_qemu(second, bench.features, log=bench.folder / "second.log")
    gone = replace(second, disks=(Disk(bench.folder / "gone.qcow2", "gone"),))
    with pytest.raises(QemuError, match="QEMU ended at once with exit code 1") as caught:
        start_qemu(gone, bench.features, log=bench.folder / "second.log")
    assert "gone.qcow2" in (caught.value.details or "")


def test_the_longest_socket_path(bench: Bench) -> None:
    """The limit we check is one QEMU accepts."""
    pad = MAX_SOCKET_PATH - len(str(bench.folder)) - 1
    bench.spec = replace(bench.spec, monitor_socket=bench.folder / ("m" * pad))
    bench.start()

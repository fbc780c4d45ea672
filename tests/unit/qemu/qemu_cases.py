"""The machines whose command lines are kept as golden files, and the recorded answers of real QEMUs they are built on.

After a wanted change of the command line, look at the difference this makes:

    python tests/unit/qemu/qemu_cases.py write

A new QEMU is recorded from a folder with its binaries; its numbers become part of the file names:

    python tests/unit/qemu/qemu_cases.py record FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from qvm.arch import ALL, Arch, find_arch
from qvm.config.model import Mount
from qvm.instance.spec import Dimm, Disk, InstanceSpec, KernelBoot
from qvm.qemu.cmdline import build_argv
from qvm.qemu.features import Firmware, QemuFeatures
from qvm.qemu.probe import run_probe
from qvm.units import GiB

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "golden"
FEATURES = HERE / "features"

HOME = Path("/home/ana/.qvm")
UUID = "6c1f1f0c-7a8e-4b57-9f2d-0d9a4c2b8e11"
_CMDLINE = {arch.name: f"root=/dev/vda rw quiet console={arch.console}" for arch in ALL}
_FIRMWARE = {
    ("x86_64", "Linux"): Firmware(Path("/usr/share/OVMF/OVMF_CODE_4M.fd"), Path("/usr/share/OVMF/OVMF_VARS_4M.fd")),
    ("aarch64", "Linux"): Firmware(Path("/usr/share/AAVMF/AAVMF_CODE.fd"), Path("/usr/share/AAVMF/AAVMF_VARS.fd")),
    ("armv7l", "Linux"): Firmware(Path("/usr/share/AAVMF/AAVMF32_CODE.fd"), Path("/usr/share/AAVMF/AAVMF32_VARS.fd")),
    ("riscv64", "Linux"): Firmware(Path("/usr/share/qemu-efi-riscv64/RISCV_VIRT_CODE.fd"),
                                   Path("/usr/share/qemu-efi-riscv64/RISCV_VIRT_VARS.fd")),
    ("x86_64", "Darwin"): Firmware(Path("/opt/homebrew/share/qemu/edk2-x86_64-code.fd"),
                                   Path("/opt/homebrew/share/qemu/edk2-i386-vars.fd")),
    ("aarch64", "Darwin"): Firmware(Path("/opt/homebrew/share/qemu/edk2-aarch64-code.fd"),
                                    Path("/opt/homebrew/share/qemu/edk2-arm-vars.fd")),
}
AWKWARD_MOUNTS = (
    ("/home/ana/work", True),
    ("/home/ana/My Projects/a,b=c", False),
    ("/home/ana/Müller 日本", True),
)
VARIANTS = ("direct", "uefi", "ramfile", "mounts", "fork")


@dataclass(frozen=True)
class HostKind:
    system: str
    machine: str
    """Its `platform.machine()`."""

    @property
    def name(self) -> str:
        return ("mac-" if self.system == "Darwin" else "") + self.machine

    def accels_for(self, arch: Arch) -> tuple[str, ...]:
        own = find_arch(self.machine) is arch
        return ("hvf" if self.system == "Darwin" else "kvm", "tcg") if own else ("tcg",)


LINUX = HostKind("Linux", "x86_64")
MAC = HostKind("Darwin", "arm64")
HOSTS = (LINUX, HostKind("Linux", "aarch64"), MAC, HostKind("Darwin", "x86_64"))


@dataclass(frozen=True)
class Case:
    arch: str
    accel: str
    version: str
    variant: str
    host: HostKind = LINUX

    @property
    def name(self) -> str:
        tail = "" if self.variant == "direct" else f"-{self.variant}"
        return f"{self.arch}-on-{self.host.name}-{self.accel}-{self.version}{tail}"


def cases() -> list[Case]:
    """Every guest on every kind of host: a host's own accelerator runs its own architecture, TCG all others."""
    plain = [
        Case(arch.name, accel, version, "direct", host)
        for version in ("7.2", "10.0") for arch in ALL for host in HOSTS for accel in host.accels_for(arch)
    ]
    return plain + [Case(arch.name, "tcg", "10.0", variant) for arch in ALL for variant in VARIANTS[1:]]


def make_spec(arch: str, accel: str, variant: str = "direct", home: Path = HOME) -> InstanceSpec:
    """A machine with everything on it, all its files under `home`."""
    folder = home / "_instances" / "dev"
    mounts: tuple[tuple[str, bool], ...] = AWKWARD_MOUNTS if variant == "mounts" else AWKWARD_MOUNTS[:1]
    if variant == "mounts":
        mounts += tuple((f"/srv/share{number}", True) for number in range(6))
    under = home if home != HOME else None  # a real run needs real folders
    return InstanceSpec(
        name="dev",
        uuid=UUID,
        arch=arch,
        accel=accel,
        cpus=2,
        memory=2 * GiB,
        disks=(
            Disk(folder / "root.qcow2", "root"),
            Disk(home / "_data" / "dev.qcow2", "data"),
            Disk(folder / "seed.iso", "seed", format="raw", readonly=True),
        ),
        mounts=tuple(
            Mount(under / path.lstrip("/") if under else Path(path), PurePosixPath(path), writable)
            for path, writable in mounts
        ),
        mac="52:54:00:4a:7b:c1",
        ssh_port=40022,
        monitor_socket=folder / "qmp.sock",
        agent_socket=folder / "agent.sock",
        stream_socket=folder / "stream.sock",
        serial_log=folder / "serial.log",
        boot=None if variant == "uefi" else KernelBoot(
            folder / "vmlinuz" if under else Path("/home/ana/.cache/qvm/images/0123abcd/vmlinuz"),
            folder / "initrd" if under else Path("/home/ana/.cache/qvm/images/0123abcd/initrd"),
            _CMDLINE[arch],
        ),
        firmware_vars=folder / "efivars.fd" if variant == "uefi" else None,
        ram_file=folder / "ram" if variant in ("ramfile", "fork") else None,
        ram_shared=variant == "ramfile",
        dimms=(Dimm("dimm0", GiB, folder / "dimm0"),) if variant == "fork" and arch == "x86_64" else (),
        incoming=variant == "fork",
        mount_slots=4 if variant == "fork" else 0,
        idle_folder=home / "idle" if variant == "fork" else None,
    )


def load_features(arch: str, version: str) -> QemuFeatures:
    """The recorded answers of Debian's QEMU on Linux."""
    data = json.loads((FEATURES / f"qemu-{version}-{arch}.json").read_text())
    return replace(QemuFeatures.from_dict(data), firmware=_FIRMWARE.get((arch, "Linux")))


def on_host(features: QemuFeatures, host: HostKind) -> QemuFeatures:
    """The same QEMU on another host. Not recorded: what differs there is known from Homebrew's formula and QEMU's
    sources."""
    own = find_arch(host.machine) is find_arch(features.arch)
    if host.system == "Linux":
        return replace(features, host_machine=host.machine, accels=("kvm", "tcg") if own else ("tcg",))
    return replace(
        features,
        binary=Path("/opt/homebrew/bin") / features.binary.name,
        system="Darwin",
        host_machine=host.machine,
        package="",
        accels=("hvf", "tcg") if own else ("tcg",),
        devices=tuple(device for device in features.devices if not device.startswith("vhost")),
        netdevs=("user", "stream", "vmnet-shared"),
        sandbox=False,
        io_uring=False,
        firmware=_FIRMWARE.get((features.arch, "Darwin")),
    )


def build_case(case: Case) -> list[str]:
    features = on_host(load_features(case.arch, case.version), case.host)
    return build_argv(make_spec(case.arch, case.accel, case.variant), features)


def render(argv: list[str]) -> str:
    """One option a line, its value beside it."""
    lines: list[str] = []
    for word in argv:
        if word.startswith("-") or not lines or " " in lines[-1]:
            lines.append(word)
        else:
            lines[-1] += f" {word}" if lines[-1].startswith("-") else f"\n{word}"
    return "\n".join(lines) + "\n"


def write_golden() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.glob("*.args"):
        path.unlink()
    for case in cases():
        (GOLDEN / f"{case.name}.args").write_text(render(build_case(case)))


def record(folder: Path) -> None:
    """Ask the real binaries in `folder`; what names the recording host is replaced."""
    for arch in ALL:
        features = run_probe(folder / arch.qemu_binary, arch)
        neutral = replace(features, binary=Path("/usr/bin") / arch.qemu_binary, build="recorded", system="Linux",
                          host_machine="x86_64")
        version = ".".join(map(str, features.version[:2]))
        path = FEATURES / f"qemu-{version}-{arch.name}.json"
        path.write_text(json.dumps(neutral.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        write_golden()
    elif len(sys.argv) == 3 and sys.argv[1] == "record":
        record(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)

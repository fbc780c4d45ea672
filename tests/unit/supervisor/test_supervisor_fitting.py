"""Which saved state fits which machine, and who keeps a machine from being saved."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from qvm.config.model import Mount
from qvm.errors import GuestError, InstanceStateError
from qvm.guest.protocol import MountUser
from qvm.instance.mounted import MountedFolder, plan_mounts
from qvm.instance.spec import Disk, InstanceSpec, KernelBoot
from qvm.instance.states import SavedState, Shape
from qvm.qemu.features import QemuFeatures
from qvm.supervisor.fitting import machine_digest, shape_spec, state_spec
from qvm.supervisor.freezing import refuse_users, without_mounts
from qvm.units import GiB

FEATURES = QemuFeatures(
    binary=Path("/usr/bin/qemu-system-x86_64"), build="one", arch="x86_64", system="Linux", host_machine="x86_64",
    version=(7, 2, 0), package="", machine="pc-q35-7.2", accels=("tcg",), devices=("virtio-9p-pci",), properties=(),
    netdevs=("user",), sandbox=False, io_uring=False,
)
SHAPE = Shape(2, 2 * GiB, 4, (("dimm0", GiB),))


def spec(name: str = "dev", **changes: object) -> InstanceSpec:
    folder = Path("/q") / name
    return replace(InstanceSpec(
        name=name, uuid=f"uuid of {name}", arch="x86_64", accel="tcg", cpus=4, memory=3 * GiB,
        disks=(Disk(folder / "root.qcow2", "root"), Disk(folder / "data.qcow2", "data")),
        mounts=(Mount(folder, PurePosixPath("/mnt")),), mac="52:54:00:00:00:01", ssh_port=40022,
        monitor_socket=folder / "qmp.sock", agent_socket=folder / "agent.sock", stream_socket=folder / "stream.sock",
        serial_log=folder / "serial.log", boot=KernelBoot(Path("/i/vmlinuz"), Path("/i/initrd"), "console=ttyS0"),
    ), **changes)  # type: ignore[arg-type]


def digest(name: str = "dev", shape: Shape = SHAPE, features: QemuFeatures = FEATURES, **changes: object) -> str:
    return machine_digest(shape_spec(spec(name, **changes), shape), features)


def test_what_may_differ_between_saving_and_going_on() -> None:
    assert digest() == digest("dev2", ssh_port=0, mac="52:54:00:00:00:02", mounts=(), cpus=1, memory=GiB)


def test_what_may_not() -> None:
    others = [
        digest(shape=replace(SHAPE, cpus=4)), digest(shape=replace(SHAPE, memory=GiB)),
        digest(shape=replace(SHAPE, mounts=5)), digest(shape=replace(SHAPE, dimms=())),
        digest(features=replace(FEATURES, build="two")), digest(features=replace(FEATURES, machine="pc-q35-10.0")),
        digest(boot=KernelBoot(Path("/i/vmlinuz"), Path("/i/initrd"), "console=ttyS0 quiet")),
    ]
    assert len({digest(), *others}) == len(others) + 1


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SavedState:
    monkeypatch.setenv("QVM_HOME", str(tmp_path))
    return SavedState("s", 1.0, "boot", {}, shape=SHAPE, machine=digest(), accel="tcg", qemu="7.2.0")


def test_the_machine_that_goes_on(state: SavedState, tmp_path: Path) -> None:
    made = state_spec(spec(), state, tmp_path / "s", FEATURES)
    assert (made.cpus, made.memory, made.mount_slots, made.incoming) == (2, 2 * GiB, 4, True)
    assert made.ram_file == tmp_path / "s" / "ram" and not made.ram_shared
    assert [(dimm.id, dimm.size, dimm.file) for dimm in made.dimms] == [
        ("dimm0", GiB, tmp_path / "s" / "dimm-dimm0.ram")
    ]
    assert made.idle_folder is not None and made.idle_folder.is_dir()
    assert made.mounts == spec().mounts
    streamed = state_spec(spec(), replace(state, streamed=True), tmp_path / "s", FEATURES)
    assert streamed.ram_file is None and streamed.dimms[0].file is None


def test_a_state_that_does_not_fit_says_why(state: SavedState, tmp_path: Path) -> None:
    with pytest.raises(InstanceStateError, match="another QEMU"):
        state_spec(spec(), state, tmp_path, replace(FEATURES, build="two"))
    with pytest.raises(InstanceStateError, match="under tcg"):
        state_spec(spec(accel="kvm"), state, tmp_path, FEATURES)


def test_mounts_that_a_state_has_no_device_for_are_left_to_be_plugged_in(state: SavedState, tmp_path: Path) -> None:
    assert len(state_spec(spec(mounts=spec().mounts * 5), state, tmp_path, FEATURES).mounts) == 4


USER = MountUser(77, "sleep", "/mnt/a", "cwd", None)
CONTAINED = MountUser(88, "node", "/mnt/b", "mount /app", "0123456789abcdef" * 4)


def test_who_holds_a_folder_is_named() -> None:
    refuse_users([])
    with pytest.raises(InstanceStateError) as caught:
        refuse_users([CONTAINED, USER])
    assert "container 0123456789ab uses /mnt/b" in caught.value.message
    assert caught.value.details == (
        "/mnt/b: process 88 (node) in container 0123456789ab holds it by its mount /app\n"
        "/mnt/a: process 77 (sleep) holds it by its cwd"
    )


class Channel:
    """Mounts and unmounts as the agent does, and notes it down."""

    is_open = True

    def __init__(self, *, users: tuple[MountUser, ...] = (), busy: str | None = None) -> None:
        self.users, self.busy = users, busy
        self.calls: list[str] = []

    async def find_mount_users(self, targets: object) -> tuple[MountUser, ...]:
        return self.users

    async def umount(self, target: PurePosixPath) -> bool:
        if str(target) == self.busy:
            raise GuestError("Device or resource busy")
        self.calls.append(f"-{target}")
        return True

    async def mount(self, tag: str, target: PurePosixPath, *, readonly: bool = False, mmap: bool = False) -> bool:
        self.calls.append(f"+{target}")
        return True


class Plugs:
    """Plugs in and out, and notes it down where the channel does."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    async def present(self) -> set[str]:
        return {"rng0", *(each.device for each in MOUNTS if each.device)}

    async def unplug(self, folder: MountedFolder) -> None:
        self.calls.append(f"-{folder.device}")

    async def plug_missing(self, folders: tuple[MountedFolder, ...]) -> None:
        self.calls += [f"+{each.device}" for each in folders if each.device and f"-{each.device}" in self.calls]


MOUNTS = plan_mounts((Mount(Path("/h"), PurePosixPath("/a")), Mount(Path("/h/in"), PurePosixPath("/a/in"))), 1)


def unmounted(channel: Channel) -> list[str]:
    async def story() -> None:
        async with without_mounts(channel, MOUNTS, Plugs(channel.calls)):  # type: ignore[arg-type]
            channel.calls.append("saved")

    asyncio.run(story())
    return channel.calls


def test_inner_folders_go_first_and_come_last() -> None:
    assert unmounted(Channel()) == ["-/a/in", "-/a", "-plug0", "saved", "+plug0", "+/a", "+/a/in"]


def test_what_is_held_stays_mounted() -> None:
    channel = Channel(users=(USER,))
    with pytest.raises(InstanceStateError, match="process 77"):
        unmounted(channel)
    assert "saved" not in channel.calls and not any(call.startswith("-") for call in channel.calls)
    channel = Channel(busy="/a")
    with pytest.raises(InstanceStateError, match="cannot be unmounted"):
        unmounted(channel)
    assert channel.calls == ["-/a/in", "+/a", "+/a/in"]

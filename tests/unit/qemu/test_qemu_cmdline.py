"""The command line: golden files for every architecture, accelerator and QEMU, and what must never be on one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path, PurePosixPath

import pytest
from qemu_cases import GOLDEN, MAC, Case, build_case, cases, load_features, make_spec, on_host, render

from qvm.arch import ALL
from qvm.config.model import Mount
from qvm.errors import HostError, QemuError, UsageError
from qvm.instance.spec import Disk
from qvm.qemu.cmdline import build_argv
from qvm.qemu.devices import MAX_MOUNTS
from qvm.qemu.features import QemuFeatures
from qvm.qemu.words import option
from qvm.units import GiB


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_golden(case: Case) -> None:
    golden = (GOLDEN / f"{case.name}.args").read_text()
    assert render(build_case(case)) == golden, "if wanted: python tests/unit/qemu/qemu_cases.py write"


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {case.name for case in cases()}


def values(argv: list[str], flag: str) -> list[str]:
    return [value for word, value in pairwise(argv) if word == flag]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_no_two_devices_share_an_address_or_an_id(case: Case) -> None:
    devs = values(build_case(case), "-device")
    addresses = [part for value in devs for part in value.split(",") if part.startswith(("addr=", "devno="))]
    assert len(set(addresses)) == len(addresses)
    ids = [part for value in devs for part in value.split(",") if part.startswith("id=")]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_nothing_listens_but_on_loopback_and_unix_sockets(case: Case) -> None:
    argv = build_case(case)
    assert all("hostfwd=tcp:127.0.0.1:" in value for value in values(argv, "-netdev"))
    assert all(value.startswith(("socket,", "file,")) and ("path=/" in value) for value in values(argv, "-chardev"))
    assert not {"-vnc", "-spice", "-gdb", "-s", "-monitor", "-qmp"} & set(argv)


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_every_disk_names_its_format(case: Case) -> None:
    argv = build_case(case)
    assert all("driver=" in value.split(",")[0] for value in values(argv, "-blockdev"))
    assert all("format=raw" in value for value in values(argv, "-drive"))


def test_commas_in_paths_are_doubled_and_equal_signs_kept() -> None:
    assert option("-x", "head", {"path": Path("/a,b=c d"), "flag": True, "off": False, "none": None}) == [
        "-x", "head,path=/a,,b=c d,flag=on,off=off",
    ]


def test_kernel_words_are_passed_as_they_are() -> None:
    spec = make_spec("x86_64", "tcg")
    assert spec.boot is not None
    spec = replace(spec, boot=replace(spec.boot, kernel=Path("/a,b/vmlinuz"), cmdline="a=b,c d"))
    argv = build_argv(spec, load_features("x86_64", "10.0"))
    assert values(argv, "-kernel") == ["/a,b/vmlinuz"]
    assert values(argv, "-append") == ["a=b,c d"]


@pytest.mark.parametrize(("accel", "version", "off"), [
    ("tcg", (7, 2, 22), True), ("tcg", (8, 2, 2), True), ("tcg", (9, 0, 0), False), ("kvm", (7, 2, 22), False),
])
def test_addresses_stay_random_except_where_emulation_pays_dearly(
    accel: str, version: tuple[int, int, int], off: bool
) -> None:
    features = replace(load_features("x86_64", "7.2"), version=version)
    (words,) = values(build_argv(make_spec("x86_64", accel), features), "-append")
    assert ("norandmaps" in words.split()) is off


def test_many_mounts_fill_many_slots() -> None:
    features = load_features("x86_64", "10.0")
    some = tuple(Mount(Path(f"/m{number}"), PurePosixPath(f"/m{number}")) for number in range(MAX_MOUNTS))
    argv = build_argv(replace(make_spec("x86_64", "tcg"), mounts=some), features)
    last = [value for value in values(argv, "-device") if value.startswith("virtio-9p-pci")][-1]
    assert "addr=0x1e.0x7" in last
    with pytest.raises(UsageError, match="at most 144 mounts"):
        build_argv(replace(make_spec("x86_64", "tcg"), mounts=(*some, some[0])), features)


def test_a_missing_device_is_left_out_or_named() -> None:
    whole = load_features("x86_64", "7.2")
    bare = replace(whole, devices=tuple(set(whole.devices) - {"virtio-rng-pci", "virtio-9p-pci"}))
    argv = build_argv(replace(make_spec("x86_64", "tcg"), mounts=()), bare)
    assert not [word for word in argv if "rng" in word]
    with pytest.raises(QemuError, match="without 9p"):
        build_argv(make_spec("x86_64", "tcg"), bare)
    with pytest.raises(QemuError, match="user-mode networking"):
        build_argv(make_spec("x86_64", "tcg"), replace(whole, netdevs=("stream",)))


def test_io_space_is_reserved_only_where_the_build_can_say_so() -> None:
    argv = build_argv(make_spec("x86_64", "tcg"), replace(load_features("x86_64", "7.2"), properties=()))
    assert not [word for word in argv if "io-reserve" in word]


def test_no_machine_returns_pages_of_a_file_that_others_use() -> None:
    for variant in ("direct", "fork"):
        argv = build_argv(make_spec("x86_64", "tcg", variant), load_features("x86_64", "10.0"))
        assert not [word for word in argv if "balloon" in word]


def test_a_fork_has_the_devices_of_its_warm_image_and_waits() -> None:
    features = load_features("x86_64", "7.2")
    fork = build_argv(make_spec("x86_64", "tcg", "fork"), features)
    warm = build_argv(replace(make_spec("x86_64", "tcg", "fork"), mounts=(), dimms=(), incoming=False), features)
    strip = [value for value in values(fork, "-device") if not value.startswith("pc-dimm")]
    assert strip == values(warm, "-device")
    assert values(fork, "-incoming") == ["defer"] and "-S" in fork
    assert "share=off" in next(value for value in values(fork, "-object") if "id=ram," in value)
    idle = [value for value in values(fork, "-fsdev") if "/idle," in value]
    assert len(idle) == 3 and all("readonly=on" in value for value in idle)


def test_no_host_port_where_none_is_wanted() -> None:
    argv = build_argv(replace(make_spec("x86_64", "tcg"), ssh_port=0), load_features("x86_64", "7.2"))
    assert values(argv, "-netdev") == ["user,id=net0"]


def test_the_wrong_emulator_is_refused() -> None:
    with pytest.raises(QemuError, match="emulates aarch64, not x86_64"):
        build_argv(make_spec("x86_64", "tcg"), load_features("aarch64", "7.2"))


def test_uefi_without_firmware_names_the_package() -> None:
    features = replace(load_features("aarch64", "7.2"), firmware=None)
    with pytest.raises(HostError, match="UEFI") as caught:
        build_argv(make_spec("aarch64", "tcg", "uefi"), features)
    assert caught.value.hint


def test_disk_ids_fit_a_virtio_serial_number() -> None:
    spec = replace(make_spec("x86_64", "tcg"), disks=(Disk(Path("/d"), "a" * 21),))
    with pytest.raises(QemuError, match="20 bytes"):
        build_argv(spec, load_features("x86_64", "7.2"))


def test_a_guest_of_strong_memory_order_on_an_arm_host_gets_no_threads_forced_on_it() -> None:
    for arch, plain in (("x86_64", True), ("s390x", True), ("aarch64", False), ("riscv64", False)):
        mac = on_host(load_features(arch, "10.0"), MAC)
        assert ("tcg,tb-size=512" in build_argv(make_spec(arch, "tcg"), mac)) is plain


def test_the_process_name_has_at_most_15_bytes() -> None:
    argv = build_argv(replace(make_spec("x86_64", "tcg"), name="a-long-profile-name"), load_features("x86_64", "7.2"))
    assert "guest=a-long-profile-name,process=qvm-a-long-prof" in [word.lstrip(",") for word in argv]


def test_devices_are_those_of_the_architectures_bus() -> None:
    for arch, bus in (("x86_64", "pcie.0"), ("armv7l", "pcie.0"), ("riscv64", "pcie.0"), ("ppc64le", "pci.0")):
        devs = values(build_argv(make_spec(arch, "tcg", "mounts"), load_features(arch, "7.2")), "-device")
        places = {part for value in devs for part in value.split(",") if part.startswith("bus=")}
        assert places == {f"bus={bus}", "bus=channels.0"}
    devs = values(build_argv(make_spec("s390x", "tcg", "mounts"), load_features("s390x", "7.2")), "-device")
    assert not [value for value in devs if "pci" in value or "addr=" in value]


def test_a_disk_of_power_or_z_boots_by_the_machines_own_firmware() -> None:
    for arch in ("ppc64le", "s390x"):
        argv = build_argv(make_spec(arch, "tcg", "uefi"), load_features(arch, "7.2"))
        assert not {"-kernel", "-drive"} & set(argv)
        assert [value for value in values(argv, "-device") if "bootindex=0" in value and "drive=disk-root" in value]


def test_states_are_only_restored_where_that_was_seen_to_work() -> None:
    for arch, version, works in (("x86_64", "7.2", True), ("aarch64", "7.2", True), ("armv7l", "7.2", True),
                                 ("s390x", "7.2", True), ("riscv64", "7.2", False), ("riscv64", "10.0", True),
                                 ("ppc64le", "10.0", False)):
        if works:
            load_features(arch, version).require_restore()
        else:
            with pytest.raises(QemuError, match=f"does not restore {arch} machines"):
                load_features(arch, version).require_restore()


def test_a_32_bit_machine_has_so_much_memory_and_no_more() -> None:
    features = load_features("armv7l", "7.2")
    build_argv(replace(make_spec("armv7l", "tcg"), memory=3 * GiB), features)
    with pytest.raises(UsageError, match="at most 3 GiB") as caught:
        build_argv(replace(make_spec("armv7l", "tcg"), memory=4 * GiB), features)
    assert caught.value.hint == "start with less: --memory 3"


@pytest.mark.parametrize("arch", [arch.name for arch in ALL])
@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_features_survive_json(arch: str, version: str) -> None:
    features = load_features(arch, version)
    assert QemuFeatures.from_dict(features.to_dict()) == features
    assert features.version_text.startswith(version)
    assert "Debian" in features.version_text

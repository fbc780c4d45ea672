"""For which architecture a disk is: partition tables, EFI system partitions and loaders made by hand."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from disk_parts import ESP, LINUX, MACHINES, ROOT_ARM, ROOT_X86, SECTOR, bootable, fat16, gpt, loader

from qvm.arch import AARCH64, X86_64
from qvm.errors import ImageError, UsageError
from qvm.image.admit import choose_arch
from qvm.image.bootable import find_architectures


def put(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("names", "root", "found"), [
    (("BOOTX64.EFI",), LINUX, ["x86_64"]),
    (("BOOTAA64.EFI",), LINUX, ["aarch64"]),
    (("BOOTRISCV64.EFI",), LINUX, ["riscv64"]),
    (("BOOTX64.EFI", "BOOTAA64.EFI"), LINUX, ["aarch64", "x86_64"]),
    (("BOOTX64.EFI", "BOOTAA64.EFI"), ROOT_ARM, ["aarch64"]),
    (("BOOTX64.EFI",), ROOT_ARM, ["x86_64"]),
])  # fmt: skip
def test_loaders_and_root_partitions_tell(tmp_path: Path, names: tuple[str, ...], root: str, found: list[str]) -> None:
    assert find_architectures(put(tmp_path, bootable(*names, root=root))) == found


def test_the_programs_own_machine_counts_not_only_its_name(tmp_path: Path) -> None:
    esp = fat16({"BOOTX64.EFI": loader(MACHINES["BOOTAA64.EFI"])})
    with pytest.raises(ImageError, match="no boot loader at EFI/BOOT"):
        find_architectures(put(tmp_path, bytes(gpt([(ESP, esp)]))))


def test_names_are_found_in_any_case(tmp_path: Path) -> None:
    esp = fat16({"bootriscv64.efi": loader(0x5064)})
    assert find_architectures(put(tmp_path, bytes(gpt([(ESP, esp)])))) == ["riscv64"]


def test_a_disk_with_an_mbr(tmp_path: Path) -> None:
    esp = fat16({"BOOTX64.EFI": loader(0x8664)})
    disk = bytearray((1 << 20) + len(esp))
    disk[1 << 20 :] = esp
    disk[446:462] = struct.pack("<B3sB3sII", 0x80, bytes(3), 0xEF, bytes(3), (1 << 20) // SECTOR, len(esp) // SECTOR)
    disk[510:512] = b"\x55\xaa"
    assert find_architectures(put(tmp_path, bytes(disk))) == ["x86_64"]
    with pytest.raises(ImageError, match="truncated"):
        find_architectures(put(tmp_path, bytes(disk[:-SECTOR])))


def _broken(what: str) -> bytes:
    disk = bytearray(bootable("BOOTX64.EFI"))
    esp = 1 << 20
    match what:
        case "header":
            disk[600] ^= 1
        case "entries":
            disk[1030] ^= 1
        case "no header":
            disk[512:1024] = bytes(512)
        case "cut":
            del disk[12 << 20 :]
        case "no file system":
            disk[esp : esp + 512] = bytes(512)
        case "file system larger than its partition":
            struct.pack_into("<I", disk, esp + 32, 1 << 20)
        case "no such folder":
            disk = gpt([(ESP, fat16({"BOOTX64.EFI": loader(0x8664)}, folder="DEBIAN"))])
        case "BIOS only":
            disk = gpt([("21686148-6449-6e6f-744e-656564454649", b""), (ROOT_X86, b"")])
        case "no partitions":
            disk = gpt([])
    return bytes(disk)


@pytest.mark.parametrize(("what", "reason"), [
    ("header", r"table \(GPT\) is damaged"), ("entries", r"table \(GPT\) is damaged"),
    ("no header", r"\(GPT\) is missing or damaged"), ("cut", "truncated disk"),
    ("no file system", "cannot be read: no FAT boot sector"),
    ("file system larger than its partition", "larger than its partition"),
    ("no such folder", "no boot loader at EFI/BOOT"), ("BIOS only", "boots by BIOS only"),
    ("no partitions", "partition table is empty"),
])  # fmt: skip
def test_what_cannot_boot_is_refused_with_the_reason(tmp_path: Path, what: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        find_architectures(put(tmp_path, _broken(what)))


def test_a_folder_that_leads_back_to_itself_has_an_end(tmp_path: Path) -> None:
    esp = bytearray(fat16({"BOOTX64.EFI": loader(0x8664)}))
    struct.pack_into("<H", esp, SECTOR + 3 * 2, 3)  # the chain of EFI/BOOT
    assert find_architectures(put(tmp_path, bytes(gpt([(ESP, bytes(esp))])))) == ["x86_64"]


@pytest.mark.parametrize("seed", range(40))
def test_noise_is_refused_not_stumbled_over(tmp_path: Path, seed: int) -> None:
    """Random damage in the ESP: an answer or a refusal, and nothing else."""
    import random

    noise = random.Random(seed)
    disk = bytearray(bootable("BOOTX64.EFI"))
    for _ in range(30):
        disk[(1 << 20) + noise.randrange(64 * 1024)] = noise.randrange(256)
    try:
        assert set(find_architectures(put(tmp_path, bytes(disk)))) <= {"x86_64"}
    except ImageError as error:
        assert error.message


def test_choosing(tmp_path: Path) -> None:
    x86 = put(tmp_path, bootable("BOOTX64.EFI"))
    assert choose_arch(x86, None, what="it") is X86_64
    assert choose_arch(x86, X86_64, what="it") is X86_64
    with pytest.raises(ImageError, match="it is for x86_64, not aarch64") as refused:
        choose_arch(x86, AARCH64, what="it")
    assert refused.value.hint == "--arch x86_64"
    both = put(tmp_path, bootable("BOOTX64.EFI", "BOOTAA64.EFI"))
    assert choose_arch(both, AARCH64, what="it") is AARCH64
    with pytest.raises(UsageError, match="boots on aarch64, x86_64"):
        choose_arch(both, None, what="it")

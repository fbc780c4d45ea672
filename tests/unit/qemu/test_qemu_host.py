"""Finding QEMU and its firmware, naming packages, remembering: everything that looks at files of the host."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
from qemu_cases import load_features

from qvm.arch import AARCH64, ALL, X86_64, find_arch
from qvm.errors import QemuMissingError
from qvm.qemu import cache, probe
from qvm.qemu.features import Firmware
from qvm.qemu.firmware import find_described, parse_descriptor
from qvm.qemu.packages import find_manager, firmware_hint, parse_os_release, qemu_hint
from qvm.qemu.probe import find_qemu, probe_qemu


def make_binary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVM_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QVM_QEMU", raising=False)


def test_override_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = make_binary(tmp_path / "bin" / "qemu-system-x86_64")
    monkeypatch.setenv("QVM_QEMU", str(tmp_path / "bin"))
    assert find_qemu(X86_64) == binary
    assert find_qemu(AARCH64) is None


def test_override_by_binary_finds_its_sibling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = make_binary(tmp_path / "qemu-system-x86_64")
    sibling = make_binary(tmp_path / "qemu-system-aarch64")
    monkeypatch.setenv("QVM_QEMU", str(binary))
    assert (find_qemu(X86_64), find_qemu(AARCH64)) == (binary, sibling)
    other = make_binary(tmp_path / "my-own-qemu")
    monkeypatch.setenv("QVM_QEMU", str(other))
    assert find_qemu(X86_64) == other


def test_path_before_the_usual_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = make_binary(tmp_path / "libexec" / "qemu-system-x86_64")
    monkeypatch.setattr(probe, "_FOLDERS", (str(tmp_path / "libexec"),))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert find_qemu(X86_64) == usual
    first = make_binary(tmp_path / "bin" / "qemu-system-x86_64")
    assert find_qemu(X86_64) == first


def test_missing_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_FOLDERS", (str(tmp_path / "none"),))
    monkeypatch.setenv("PATH", str(tmp_path))
    guest = AARCH64 if find_arch(platform.machine()) == X86_64 else X86_64  # never RHEL's /usr/libexec/qemu-kvm
    with pytest.raises(QemuMissingError, match="not installed") as caught:
        probe_qemu(guest)
    assert caught.value.exit_code == 4 and caught.value.hint
    monkeypatch.setenv("QVM_QEMU", str(tmp_path / "nowhere"))
    with pytest.raises(QemuMissingError, match=r"QVM_QEMU is .*nowhere"):
        probe_qemu(guest)


@pytest.mark.parametrize(
    ("text", "manager"),
    [
        ('ID=debian\nVERSION_ID="12"\n', "apt"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', "apt"),
        ("ID=fedora\n", "dnf"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "dnf"),
        ("ID=arch\n", "pacman"),
        ('ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n', "zypper"),
        ("ID=alpine\n", "apk"),
        ("# nothing\nID=nixos\n", None),
        ("", None),
    ],
)
def test_package_manager(text: str, manager: str | None) -> None:
    assert find_manager(parse_os_release(text), "Linux") == manager
    assert find_manager(parse_os_release(text), "Darwin") == "brew"


def test_hints_name_a_command_for_every_manager_and_architecture() -> None:
    for manager in ("apt", "dnf", "pacman", "zypper", "apk", "brew"):
        for arch in ALL:
            assert "install" in qemu_hint(arch, manager) or "add" in qemu_hint(arch, manager) or "-S" in qemu_hint(
                arch, manager)
            assert firmware_hint(arch, manager)
    assert qemu_hint(X86_64, "apt") == "sudo apt install qemu-system-x86"
    assert firmware_hint(AARCH64, "apt") == "sudo apt install qemu-efi-aarch64"


def descriptor(code: Path, variables: Path, **changes: object) -> dict[str, object]:
    return {
        "interface-types": ["uefi"],
        "mapping": {
            "device": "flash",
            "executable": {"filename": str(code), "format": "raw"},
            "nvram-template": {"filename": str(variables), "format": "raw"},
        },
        "targets": [{"architecture": "x86_64", "machines": ["pc-i440fx-*", "pc-q35-*"]}],
        "features": ["acpi-s3"],
        **changes,
    }


def test_descriptors_by_precedence(tmp_path: Path) -> None:
    code, variables = tmp_path / "code.fd", tmp_path / "vars.fd"
    code.touch()
    variables.touch()
    local, system = tmp_path / "local", tmp_path / "system"
    local.mkdir()
    system.mkdir()
    good = json.dumps(descriptor(code, variables))
    (system / "40-secure.json").write_text(json.dumps(descriptor(code, variables, features=["secure-boot"])))
    (system / "50-broken.json").write_text("{")
    (system / "55-gone.json").write_text(json.dumps(descriptor(tmp_path / "gone.fd", variables)))
    (system / "60-good.json").write_text(good)
    assert find_described(X86_64, [local, system]) == Firmware(code, variables)
    assert find_described(AARCH64, [local, system]) is None
    (local / "60-good.json").touch()  # an empty file hides its namesake
    assert find_described(X86_64, [local, system]) is None


def test_descriptors_that_do_not_fit() -> None:
    code, variables = Path("/c"), Path("/v")
    plain = descriptor(code, variables)
    assert parse_descriptor(plain, X86_64) == Firmware(code, variables)
    memory = {"device": "memory", "filename": "/c"}
    assert parse_descriptor({**plain, "mapping": memory}, X86_64) is None
    assert parse_descriptor({**plain, "interface-types": ["bios"]}, X86_64) is None
    other = {"architecture": "x86_64", "machines": ["pc-i440fx-*"]}
    assert parse_descriptor({**plain, "targets": [other]}, X86_64) is None
    assert isinstance(plain["mapping"], dict)
    assert parse_descriptor({**plain, "mapping": {**plain["mapping"], "mode": "stateless"}}, X86_64) is None


def test_cache_keeps_while_the_key_is_the_same(tmp_path: Path) -> None:
    cache.save_entry("x.json", "key 1", {"a": 1})
    assert cache.load_entry("x.json", "key 1") == {"a": 1}
    assert cache.load_entry("x.json", "key 2") is None
    assert cache.load_entry("y.json", "key 1") is None
    path = cache.probe_dir() / "x.json"
    assert path.stat().st_mode & 0o777 == 0o600
    for damage in ("", "{", "[]", '{"key": "key 1", "value": 3}', "\x00\xff"):
        path.write_text(damage)
        assert cache.load_entry("x.json", "key 1") is None
    cache.save_entry("x.json", "key 1", {"a": 2})
    assert cache.load_entry("x.json", "key 1") == {"a": 2}
    assert [entry.name for entry in cache.probe_dir().iterdir()] == ["x.json"]


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("QVM_CACHE_HOME", str(tmp_path / "file" / "cache"))
    cache.save_entry("x.json", "key", {"a": 1})
    assert cache.load_entry("x.json", "key") is None


def test_probe_asks_once_per_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = make_binary(tmp_path / "qemu-system-x86_64")
    monkeypatch.setenv("QVM_QEMU", str(binary))
    asked: list[Path] = []

    def answer(path: Path, arch: object, *, timeout: float) -> object:
        asked.append(path)
        return load_features("x86_64", "7.2")

    monkeypatch.setattr(probe, "run_probe", answer)
    first, second = probe_qemu(X86_64), probe_qemu(X86_64)
    assert first == second and len(asked) == 1
    assert first.binary == binary
    for path in cache.probe_dir().iterdir():
        path.write_text(path.read_text().replace('"version"', '"verzion"'))  # whole, but not ours
    probe_qemu(X86_64)
    assert len(asked) == 2
    binary.write_text("#!/bin/sh\nexit 2\n# another build\n")
    probe_qemu(X86_64)
    assert len(asked) == 3

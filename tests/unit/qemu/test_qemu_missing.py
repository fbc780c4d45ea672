"""QEMU that is missing or known to be bad: what is said, and what `doctor --fix` does about it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from qemu_cases import MAC, load_features, on_host

from qvm.arch import ALL, ARMV7L, RISCV64, S390X
from qvm.commands.doctor import Check, mend
from qvm.errors import HostError, QemuMissingError, QemuTooOldError
from qvm.qemu.defects import DEFECTS, refuse_known_bad
from qvm.qemu.packages import install_argv, qemu_hint
from qvm.qemu.probe import probe_qemu
from qvm.units import GiB


def write_program(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of PATH for programs that a test makes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return folder


def test_apts_package_is_the_one_this_release_has(bin_folder: Path) -> None:
    """Debian 13 has qemu-system-riscv; Debian 12 has all that is rare in qemu-system-misc."""
    write_program(bin_folder, "apt-cache", '[ "$4" = qemu-system-misc ] && echo "Package: $4"')
    assert qemu_hint(RISCV64, "apt") == "sudo apt install qemu-system-misc"
    assert qemu_hint(S390X, "apt") == "sudo apt install qemu-system-misc"
    write_program(bin_folder, "apt-cache", 'echo "Package: $4"')
    assert qemu_hint(RISCV64, "apt") == "sudo apt install qemu-system-riscv"
    write_program(bin_folder, "apt-cache", "exit 100")
    assert qemu_hint(RISCV64, "apt") == "sudo apt install qemu-system-riscv"


@pytest.mark.parametrize("arch", ALL, ids=lambda arch: arch.name)
def test_the_error_of_a_missing_emulator_names_this_hosts_package(
    arch: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qvm.arch import Arch
    from qvm.qemu import packages

    assert isinstance(arch, Arch)
    monkeypatch.setenv("QVM_QEMU", str(tmp_path))
    release = tmp_path / "os-release"
    monkeypatch.setattr(packages, "OS_RELEASE", release)
    for text, command in (("ID=fedora", "sudo dnf install"), ("ID=alpine", "sudo apk add"),
                          ("ID=cachyos\nID_LIKE=arch", "sudo pacman -S")):
        release.write_text(text)
        with pytest.raises(QemuMissingError, match=arch.qemu_binary) as caught:
            probe_qemu(arch)
        assert f"{command} {arch.qemu_packages[command.split()[1]][0]}" in (caught.value.hint or "")


def test_only_our_own_install_commands_are_run() -> None:
    assert install_argv("sudo apt install qemu-system-arm", root=False) == [
        "sudo", "apt-get", "install", "-y", "qemu-system-arm"]
    assert install_argv("sudo dnf install qemu-system-ppc", root=True) == ["dnf", "install", "-y", "qemu-system-ppc"]
    assert install_argv("brew install qemu", root=False) == ["brew", "install", "qemu"]
    for other in ("sudo usermod -aG kvm ana", "install openssh-client", "sudo apt install a; reboot",
                  "sudo apt install --reinstall x", "sudo apt install ", "free some space"):
        assert install_argv(other, root=True) is None


def test_doctor_fix_installs_what_failed_and_nothing_else(bin_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    write_program(bin_folder, "sudo", 'exec "$@"')
    write_program(bin_folder, "apt-get", f'echo "$@" >>{log}')
    checks = [
        Check("QEMU", ok=False, message="missing", fix="sudo apt install qemu-system-arm"),
        Check("again", ok=False, message="missing", fix="sudo apt install qemu-system-arm"),
        Check("docker", ok=None, message="optional", fix="sudo apt install docker-cli"),
        Check("space", ok=False, message="full", fix="free some space"),
        Check("ssh", ok=True, message="there"),
    ]
    said: list[str] = []
    assert mend(checks, said.append) == checks[:2]
    assert log.read_text() == "install -y qemu-system-arm\n"
    assert len(said) == 1 and said[0].endswith("apt-get install -y qemu-system-arm")
    write_program(bin_folder, "apt-get", "exit 100")
    with pytest.raises(HostError, match="exit code 100") as caught:
        mend(checks, said.append)
    assert caught.value.hint == "run it yourself: sudo apt install qemu-system-arm"


def test_known_bad_versions_are_refused_with_what_to_install() -> None:
    x86 = load_features("x86_64", "7.2")
    for version, bad in (((8, 0, 4), False), ((8, 1, 0), True), ((8, 1, 1), False), ((10, 0, 0), False)):
        features = replace(x86, version=version)
        if not bad:
            refuse_known_bad(features, "tcg", 2 * GiB, mac=())
            continue
        with pytest.raises(QemuTooOldError, match=r"hang .* 8\.1\.0") as caught:
            refuse_known_bad(features, "tcg", 2 * GiB, mac=())
        assert "qemu" in (caught.value.hint or "") and "issues/1864" in (caught.value.details or "")
        refuse_known_bad(features, "kvm", 2 * GiB, mac=())
        other = replace(load_features("armv7l", "7.2"), version=version)
        refuse_known_bad(other, "tcg", ARMV7L.memory_limit or 0, mac=())


def test_a_vm_that_would_crash_the_mac_is_not_started() -> None:
    features = on_host(load_features("aarch64", "7.2"), MAC)
    with pytest.raises(QemuTooOldError, match="crashes the whole Mac") as caught:
        refuse_known_bad(features, "hvf", 4 * GiB, mac=(12, 3, 1))
    assert caught.value.hint == "upgrade macOS, or start with --memory 3"
    refuse_known_bad(features, "hvf", 3 * GiB, mac=(12, 3, 1))
    refuse_known_bad(features, "hvf", 4 * GiB, mac=(12, 4))
    refuse_known_bad(features, "tcg", 4 * GiB, mac=(12, 3, 1))
    refuse_known_bad(features, "tcg", 4 * GiB, mac=())


def test_every_defect_has_a_source() -> None:
    assert all(defect.source.startswith("https://") for defect in DEFECTS)

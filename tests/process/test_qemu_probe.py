"""Asking a binary what it can do, and proving an accelerator: with the stub, and with the QEMU of this host."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from stub_qemu import write_stub

from qvm.arch import ALL, X86_64, Arch
from qvm.errors import QemuError, QemuTooOldError, QvmError
from qvm.qemu import hostinfo
from qvm.qemu.accel import probe_accelerator
from qvm.qemu.bus import virtio
from qvm.qemu.features import QemuFeatures
from qvm.qemu.hostinfo import Host, KvmDevice, look_at_kvm, read_boot_id, this_host
from qvm.qemu.probe import find_qemu, interesting_devices, probe_qemu, run_probe
from qvm.qemu.proof import Trial, run_proof


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QVM_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("QVM_STUB", raising=False)
    return write_stub(tmp_path)


def write_program(folder: Path, text: str) -> Path:
    path = folder / "qemu-system-x86_64"
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_the_stub_answers(stub: Path) -> None:
    features = run_probe(stub, X86_64)
    assert features.version == (7, 2, 0) and features.machine == "pc-q35-7.2"
    assert features.accels == ("kvm", "tcg")
    assert features.netdevs == ("user", "stream")
    assert not features.sandbox and not features.io_uring
    assert features.has("virtio-9p-pci")
    assert not features.has("pcie-root-port", "io-reserve")


def test_a_build_without_a_device(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVM_STUB", "no-9p")
    assert not run_probe(stub, X86_64).has("virtio-9p-pci")


def test_too_old(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVM_STUB", "old")
    with pytest.raises(QemuTooOldError, match=r"version 6\.2\.0; qvm needs 7\.0") as caught:
        run_probe(stub, X86_64)
    assert caught.value.exit_code == 4 and caught.value.hint


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("abort", "failed to set MSR"),
        ("mute", ""),
        ("garbage", "Segmentation fault: not really"),
        ("deaf:query-machines", ""),
        ("babble:query-qmp-schema", "this is no JSON"),
        ("die:query-target", ""),
    ],
)
def test_a_sick_binary_ends_in_an_error_in_time(
    stub: Path, monkeypatch: pytest.MonkeyPatch, words: str, said: str
) -> None:
    monkeypatch.setenv("QVM_STUB", words)
    began = time.monotonic()
    with pytest.raises(QemuError, match="cannot be used") as caught:
        run_probe(stub, X86_64, timeout=1.0)
    assert time.monotonic() - began < 3
    assert said in (caught.value.details or "")
    assert caught.value.hint


@pytest.mark.parametrize(
    "text", ["#!/bin/sh\nexit 3\n", "#!/bin/sh\necho 'no library' >&2; exit 127\n", "not a program", "#!/nowhere\n"]
)
def test_what_is_no_qemu_at_all(tmp_path: Path, text: str) -> None:
    with pytest.raises(QvmError, match="cannot be used"):
        run_probe(write_program(tmp_path, text), X86_64, timeout=2.0)


def test_endless_output_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(QemuError, match="cannot be used"):
        run_probe(write_program(tmp_path, "#!/bin/sh\nexec tr '\\0' x </dev/zero\n"), X86_64, timeout=5.0)


def test_answers_are_remembered_and_damage_is_mended(stub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVM_QEMU", str(stub))
    first = probe_qemu(X86_64)
    monkeypatch.setenv("QVM_STUB", "mute")  # asking again would not end well
    assert probe_qemu(X86_64, timeout=0.5) == first
    (remembered,) = (stub.parent / "cache" / "probe").iterdir()
    remembered.write_bytes(b"\x00garbage{")
    with pytest.raises(QemuError):
        probe_qemu(X86_64, timeout=0.5)
    monkeypatch.delenv("QVM_STUB")
    assert probe_qemu(X86_64) == first
    monkeypatch.setenv("QVM_STUB", "mute")
    assert probe_qemu(X86_64, timeout=0.5) == first


def guest(folder: Path) -> tuple[Path, Path]:
    """Files that name a kernel and an initramfs; the stub does not read them."""
    for name in ("vmlinuz", "initrd"):
        (folder / name).touch()
    return folder / "vmlinuz", folder / "initrd"


@pytest.mark.parametrize(
    ("words", "proven", "reason", "conclusive"),
    [
        ("proof-ok", True, None, True),
        ("proof-abort", False, "QEMU: KVM is not what it was", True),
        ("proof-internal-error", False, "state internal-error", True),
        ("proof-reset", False, "ended without an answer", True),
        ("proof-silent", False, "did not start within 0.8 s", False),
    ],
)
def test_the_proof(
    stub: Path, monkeypatch: pytest.MonkeyPatch, words: str, proven: bool, reason: str | None, conclusive: bool
) -> None:
    features = run_probe(stub, X86_64)
    monkeypatch.setenv("QVM_STUB", words)
    began = time.monotonic()
    outcome = run_proof(features, Trial("kvm", *guest(stub.parent), timeout=0.8))
    assert time.monotonic() - began < 1.5
    assert (outcome.proven, outcome.conclusive) == (proven, conclusive)
    assert (reason is None) == (outcome.reason is None) and (reason or "") in (outcome.reason or "")


@pytest.mark.parametrize(("words", "proven"), [("proof-silent", True), ("proof-internal-error", False)])
def test_the_weaker_proof(stub: Path, monkeypatch: pytest.MonkeyPatch, words: str, proven: bool) -> None:
    features = run_probe(stub, X86_64)
    monkeypatch.setenv("QVM_STUB", words)
    outcome = run_proof(features, Trial("kvm", None, None, timeout=0.5))
    assert outcome.proven is proven
    assert "firmware only" in outcome.evidence


def test_a_qemu_that_cannot_be_run_is_no_proof(stub: Path) -> None:
    features = replace(run_probe(stub, X86_64), binary=stub.with_name("gone"))
    outcome = run_proof(features, Trial("kvm", None, None))
    assert not outcome.proven and "not installed" in (outcome.reason or "")


def real_features(arch: Arch) -> QemuFeatures:
    if find_qemu(arch) is None:
        pytest.skip(f"{arch.qemu_binary} is missing: apt install {arch.qemu_package}")
    return probe_qemu(arch)


@pytest.mark.parametrize("arch", ALL, ids=lambda arch: arch.name)
def test_the_real_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: Arch) -> None:
    monkeypatch.setenv("QVM_CACHE_HOME", str(tmp_path))
    began = time.monotonic()
    features = real_features(arch)
    asked = time.monotonic() - began
    began = time.monotonic()
    assert probe_qemu(arch) == features
    assert time.monotonic() - began < 0.1, "remembered answers must cost nothing"
    assert asked < 5
    assert "tcg" in features.accels and "user" in features.netdevs
    assert set(features.devices) <= set(interesting_devices(arch)) and features.has(virtio("9p", arch.bus))


def test_a_real_kvm_verdict_comes_within_3_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this host's verdict is, it has a reason or a proof, and the second look is free."""
    monkeypatch.setenv("QVM_CACHE_HOME", str(tmp_path))
    host = this_host()
    arch = next((arch for arch in ALL if arch.name == host.machine), None)
    if arch is None or not Path("/dev/kvm").exists():
        pytest.skip("this host has no /dev/kvm")
    features = real_features(arch)
    began = time.monotonic()
    verdict = probe_accelerator("kvm", arch, features, None, None)
    assert time.monotonic() - began < 3.5
    assert verdict.proof and (verdict.usable or verdict.reason)
    again = probe_accelerator("kvm", arch, features, None, None)
    assert (again.usable, again.reason) == (verdict.usable, verdict.reason)


def test_looking_at_this_host() -> None:
    device = look_at_kvm()
    assert isinstance(device, KvmDevice)
    assert device.exists == Path("/dev/kvm").exists()
    assert read_boot_id() == read_boot_id()
    assert isinstance(this_host(), Host)


@pytest.mark.parametrize(("mode", "group"), [(0o060, True), (0o000, False)])
def test_kvm_without_the_right_to_open_it(monkeypatch: pytest.MonkeyPatch, mode: int, group: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        device = Path(folder) / "kvm"
        device.touch()
        device.chmod(mode)
        monkeypatch.setattr(hostinfo, "KVM_DEVICE", device)
        found = as_nobody(look_at_kvm)
    assert found["exists"] and found["denied"] and found["error"] == "Permission denied"
    assert bool(found["group"]) is group


def as_nobody(look: Callable[[], KvmDevice]) -> dict[str, Any]:
    """The answer a user without root gets: from a child process that has given root up, if we have it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        os.write(writer, json.dumps(asdict(look())).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return dict(json.loads(text))

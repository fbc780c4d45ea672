"""Choosing an accelerator on hosts of all kinds, from recorded answers; the real proof is in tests/process."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest
from qemu_cases import MAC, load_features, make_spec, on_host

from qvm.arch import AARCH64, X86_64
from qvm.errors import (
    AcceleratorError,
    InstanceStateError,
    NoSpaceError,
    PortTakenError,
    QemuError,
    QvmError,
    UsageError,
)
from qvm.qemu import accel
from qvm.qemu.accel import choose_accelerator, probe_accelerator
from qvm.qemu.features import QemuFeatures
from qvm.qemu.hostinfo import Host, KvmDevice
from qvm.qemu.machine import ended_by_chance, explain_failure
from qvm.qemu.proof import Outcome, Trial, build_proof_argv, summarise

GOOD = Outcome(True, "booted it", None, "", 0.4, True)
ABORTED = Outcome(
    False, "booted it: it failed", "QEMU: failed to set MSR 0x10a to 0x69",
    "qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69\nqemu-system-x86_64: Assertion failed.", 0.04, True,
)
SILENT = Outcome(False, "booted it: no answer", "a guest did not start within 3 s", "", 3.0, False)
ENTITLED_NOT = Outcome(False, "booted it: it failed", "QEMU: Error: HV_DENIED", "qemu: Error: HV_DENIED", 0.1, True)

X86 = load_features("x86_64", "10.0")
ARM = load_features("aarch64", "10.0")


class Prover:
    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.trials: list[Trial] = []

    def __call__(self, features: QemuFeatures, trial: Trial) -> Outcome:
        self.trials.append(trial)
        return self.outcome


def linux(device: KvmDevice | None = None, *, boot: str = "boot 1", machine: str = "x86_64") -> Host:
    found = device or KvmDevice(exists=True)
    return Host("Linux", machine, lambda: boot, lambda: found, lambda name: None)


def mac(support: str | None = "1", *, session: str = "session 1") -> Host:
    answers = {"kern.hv_support": support}
    return Host("Darwin", "arm64", lambda: session, lambda: KvmDevice(exists=False), answers.get)


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setenv("QVM_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("vmlinuz", "initrd"):
        (tmp_path / name).write_text(name)
    return {"kernel": tmp_path / "vmlinuz", "initrd": tmp_path / "initrd"}


def test_proven_kvm_is_taken_without_a_word(guest: dict[str, Path]) -> None:
    choice = choose_accelerator("auto", X86_64, X86, **guest, host=linux(), prover=Prover(GOOD))
    assert (choice.accel, choice.note) == ("kvm", None)
    assert choice.verdicts[0].proof == "booted it"


def test_unusable_kvm_gives_tcg_and_one_line(guest: dict[str, Path]) -> None:
    choice = choose_accelerator("auto", X86_64, X86, **guest, host=linux(), prover=Prover(ABORTED))
    assert choice.accel == "tcg"
    assert choice.note is not None and "\n" not in choice.note
    assert "failed to set MSR 0x10a" in choice.note and "TCG" in choice.note
    assert [verdict.usable for verdict in choice.verdicts] == [False, True]


def test_explicit_kvm_that_fails_is_an_error_with_the_reason(guest: dict[str, Path]) -> None:
    with pytest.raises(AcceleratorError, match=r"KVM cannot be used: .*MSR 0x10a") as caught:
        choose_accelerator("kvm", X86_64, X86, **guest, host=linux(), prover=Prover(ABORTED))
    assert caught.value.exit_code == 4
    assert "tcg" in (caught.value.hint or "") and "Assertion" in (caught.value.details or "")


def test_the_verdict_is_asked_once_per_boot_build_and_kernel(guest: dict[str, Path]) -> None:
    prover = Prover(ABORTED)

    def ask(features: QemuFeatures = X86, boot: str = "boot 1") -> accel.Verdict:
        return probe_accelerator("kvm", X86_64, features, **guest, host=linux(boot=boot), prover=prover)

    assert not ask().cached
    again = ask()
    assert again.cached and again.reason == ABORTED.reason and again.hint and again.details
    assert len(prover.trials) == 1
    ask(boot="boot 2")
    ask(replace(X86, build="another"), boot="boot 2")
    assert len(prover.trials) == 3
    guest["kernel"].write_text("a newer kernel")
    ask(replace(X86, build="another"), boot="boot 2")
    assert len(prover.trials) == 4
    assert ask(replace(X86, build="another"), boot="boot 2").cached


def test_a_verdict_out_of_impatience_is_kept_for_an_hour_only(
    guest: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    prover = Prover(SILENT)
    now = accel.time.time()

    def ask() -> accel.Verdict:
        return probe_accelerator("kvm", X86_64, X86, **guest, host=linux(), prover=prover)

    assert not ask().usable
    assert ask().cached
    monkeypatch.setattr(accel.time, "time", lambda: now + accel.DOUBT_LASTS + 10)
    prover.outcome = GOOD
    assert ask().usable


def test_a_damaged_verdict_is_found_anew(guest: dict[str, Path]) -> None:
    prover = Prover(GOOD)
    probe_accelerator("kvm", X86_64, X86, **guest, host=linux(), prover=prover)
    for path in (guest["kernel"].parent / "cache" / "probe").iterdir():
        path.write_text(path.read_text().replace('"usable"', '"useable"'))
    assert probe_accelerator("kvm", X86_64, X86, **guest, host=linux(), prover=prover).usable
    assert len(prover.trials) == 2


@pytest.mark.parametrize(
    ("device", "reason", "hint"),
    [
        (KvmDevice(exists=False), "there is no /dev/kvm", "nested"),
        (KvmDevice(True, "Permission denied", True, "kvm"), "group kvm", "sudo usermod -aG kvm $USER"),
        (KvmDevice(True, "Permission denied", True, "kvm", True), "group kvm", "log out and in again"),
        (KvmDevice(True, "Permission denied", True), "only its owner", "chmod 660"),
        (KvmDevice(True, "No such device"), "does not open: No such device", "dmesg"),
    ],
)
def test_what_keeps_a_user_from_kvm(guest: dict[str, Path], device: KvmDevice, reason: str, hint: str) -> None:
    prover = Prover(GOOD)
    choice = choose_accelerator("auto", X86_64, X86, **guest, host=linux(device), prover=prover)
    assert choice.accel == "tcg" and reason in (choice.note or "")
    assert hint in (choice.verdicts[0].hint or "")
    with pytest.raises(AcceleratorError, match="KVM cannot be used"):
        choose_accelerator("kvm", X86_64, X86, **guest, host=linux(device), prover=prover)
    assert prover.trials == []


def test_permission_is_asked_every_time(guest: dict[str, Path]) -> None:
    denied = linux(KvmDevice(True, "Permission denied", True, "kvm"))
    assert not probe_accelerator("kvm", X86_64, X86, **guest, host=denied, prover=Prover(GOOD)).usable
    assert probe_accelerator("kvm", X86_64, X86, **guest, host=linux(), prover=Prover(GOOD)).usable


def test_an_image_without_a_kernel_is_proven_by_firmware(guest: dict[str, Path]) -> None:
    prover = Prover(GOOD)
    choose_accelerator("auto", X86_64, X86, kernel=None, initrd=None, host=linux(), prover=prover)
    assert prover.trials == [Trial("kvm", None, None)]


def test_another_architecture_is_emulated_without_a_note(guest: dict[str, Path]) -> None:
    choice = choose_accelerator("auto", AARCH64, ARM, **guest, host=linux(), prover=Prover(GOOD))
    assert (choice.accel, choice.note) == ("tcg", None)
    assert "x86_64" in (choice.verdicts[0].reason or "")
    with pytest.raises(AcceleratorError, match="runs only x86_64 guests"):
        choose_accelerator("kvm", AARCH64, ARM, **guest, host=linux(), prover=Prover(GOOD))


def test_mac(guest: dict[str, Path]) -> None:
    features = on_host(ARM, MAC)
    assert choose_accelerator("auto", AARCH64, features, **guest, host=mac(), prover=Prover(GOOD)).accel == "hvf"
    without = choose_accelerator("auto", AARCH64, features, **guest, host=mac(None), prover=Prover(GOOD))
    assert without.accel == "tcg" and "HVF" in (without.note or "")
    denied = choose_accelerator("auto", AARCH64, features, **guest, host=mac(session="2"), prover=Prover(ENTITLED_NOT))
    assert denied.accel == "tcg" and "entitlement" in (denied.verdicts[0].hint or "")
    foreign = choose_accelerator("auto", X86_64, on_host(X86, MAC), **guest, host=mac(), prover=Prover(GOOD))
    assert (foreign.accel, foreign.note) == ("tcg", None)
    with pytest.raises(AcceleratorError, match="exists only on Linux"):
        choose_accelerator("kvm", AARCH64, features, **guest, host=mac(), prover=Prover(GOOD))


def test_other_refusals(guest: dict[str, Path]) -> None:
    with pytest.raises(AcceleratorError, match="exists only on macOS"):
        choose_accelerator("hvf", X86_64, X86, **guest, host=linux(), prover=Prover(GOOD))
    with pytest.raises(AcceleratorError, match="built without it"):
        choose_accelerator("kvm", X86_64, replace(X86, accels=("tcg",)), **guest, host=linux(), prover=Prover(GOOD))
    with pytest.raises(AcceleratorError, match="no accelerator"):
        choose_accelerator("auto", X86_64, replace(X86, accels=()), **guest, host=linux(), prover=Prover(GOOD))
    with pytest.raises(UsageError, match="unknown accelerator 'xen'"):
        choose_accelerator("xen", X86_64, X86, **guest, host=linux(), prover=Prover(GOOD))
    assert choose_accelerator("tcg", X86_64, X86, **guest, host=linux(), prover=Prover(ABORTED)).accel == "tcg"


def test_proof_machines() -> None:
    full = build_proof_argv(X86, Trial("kvm", Path("/k"), Path("/i")), 7)
    assert full[full.index("-append") + 1] == "console=ttyS0 qvm.proof panic=-1 quiet"
    assert "socket,id=monitor,fd=7" in full and "-no-reboot" in full
    weak = build_proof_argv(load_features("aarch64", "7.2"), Trial("tcg", None, None), 7)
    assert "-kernel" not in weak and any("AAVMF_CODE" in word for word in weak)
    assert any("gic-version=host" in word for word in build_proof_argv(ARM, Trial("kvm", Path("/k"), Path("/i")), 7))


@pytest.mark.parametrize(
    ("words", "summary"),
    [
        ("", None),
        (ABORTED.words, "failed to set MSR 0x10a to 0x69"),
        ("qemu-system-x86_64: warning: w\nKVM internal error. Suberror: 1\nEAX=0", "KVM internal error. Suberror: 1"),
        ("/usr/bin/qemu-system-x86_64: Could not access KVM kernel module: No such file or directory",
         "Could not access KVM kernel module: No such file or directory"),
    ],
)
def test_the_telling_line(words: str, summary: str | None) -> None:
    assert summarise(words) == summary


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("qemu-system-x86_64: -netdev user,id=net0: Could not set up host forwarding rule 'tcp:..'", PortTakenError,
         "40022"),
        ("qemu-system-x86_64: Failed to bind socket: Address already in use", PortTakenError, "40022"),
        ("Could not access KVM kernel module: Permission denied\nfailed to initialize kvm: Permission denied",
         AcceleratorError, "/dev/kvm"),
        ("qemu-system-x86_64: cannot set up guest memory 'ram': Cannot allocate memory", QemuError, "2048 MiB"),
        ('-blockdev ..: Failed to get "write" lock\nIs another process using the image [/r]?', InstanceStateError,
         "disks"),
        ("qemu-system-x86_64: writing: No space left on device", NoSpaceError, "space"),
        ("qemu-system-x86_64: -device nonsense", QemuError, "exit code 1"),
        ("", QemuError, "exit code 1"),
    ],
)
def test_last_words_become_errors(words: str, error: type[QvmError], message: str) -> None:
    found = explain_failure(words, 1, make_spec("x86_64", "tcg"), Path("/log"))
    assert type(found) is error and message in found.message
    assert found.hint or words
    assert "signal 6" in explain_failure("odd", -signal.SIGABRT, make_spec("x86_64", "tcg"), Path("/log")).message


def test_a_random_abort_is_known_by_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "qemu.log"
    assert not ended_by_chance(log)
    abort = "qemu-system-x86_64: system/physmem.c:2678: iotlb_to_section: Assertion `section_index < d' failed.\n"
    log.write_text("2026 /usr/bin/qemu-system-x86_64 -nodefaults -uuid u\n" + abort)
    assert ended_by_chance(log)
    with log.open("a") as file:
        file.write("2026 /usr/bin/qemu-system-x86_64 -nodefaults -uuid u\nterminating on signal 15\n")
    assert not ended_by_chance(log)

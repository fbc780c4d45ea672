"""Which accelerator a machine gets: proven by running a guest under it, never by looking for a device.

/dev/kvm may exist, open, create machines, and still not run a Linux guest (broken nested virtualisation does that);
CPU flags say even less. So the kernel that is to run is booted for a moment (proof.py), once per boot of the host,
QEMU build and kernel; the verdict is remembered. What can change without a reboot, such as the right to open the
device, is asked every time and costs nothing.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qvm.arch import Arch, find_arch
from qvm.errors import AcceleratorError, UsageError
from qvm.log import get_logger
from qvm.qemu.cache import file_identity, load_entry, save_entry
from qvm.qemu.defects import refuse_known_bad
from qvm.qemu.features import QemuFeatures
from qvm.qemu.hostinfo import Host, this_host
from qvm.qemu.proof import Outcome, Prover, Trial, run_proof

log = get_logger(__name__)

NAMES = ("kvm", "hvf", "tcg")
_NATIVE = {"Linux": "kvm", "Darwin": "hvf"}
_TITLES = {"kvm": "KVM", "hvf": "HVF (macOS Hypervisor)", "tcg": "TCG (software emulation)"}
DOUBT_LASTS = 3600.0
"""Seconds a verdict is kept that rests only on the time having run out."""


@dataclass(frozen=True, slots=True)
class Verdict:
    accel: str
    usable: bool
    reason: str | None
    """Why not, in one line; None when usable."""
    proof: str
    """What was done to find out, and what was seen."""
    seconds: float
    """How long finding out took, when it was found out."""
    cached: bool = False
    hint: str | None = None
    """What mends it on this host."""
    details: str | None = None
    """QEMU's own words."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "accel": self.accel, "usable": self.usable, "reason": self.reason, "proof": self.proof,
            "seconds": round(self.seconds, 3), "cached": self.cached, "hint": self.hint, "details": self.details,
        }


@dataclass(frozen=True, slots=True)
class Choice:
    accel: str
    note: str | None
    """One line for the user where something better was expected and is not usable."""
    verdicts: tuple[Verdict, ...]


def choose_accelerator(
    wanted: str,
    arch: Arch,
    features: QemuFeatures,
    *,
    kernel: Path | None,
    initrd: Path | None,
    memory: int = 0,
    host: Host | None = None,
    prover: Prover = run_proof,
) -> Choice:
    """The accelerator for a guest of `arch` with `memory` bytes.

    "auto" takes the host's own when it is proven, else TCG, with a note. A named one that is not usable raises
    AcceleratorError with the reason and what mends it, a combination that is known to fail QemuTooOldError.
    """
    choice = _choose(wanted, arch, features, kernel, initrd, host or this_host(), prover)
    refuse_known_bad(features, choice.accel, memory)
    return choice


def _choose(
    wanted: str, arch: Arch, features: QemuFeatures, kernel: Path | None, initrd: Path | None, host: Host,
    prover: Prover,
) -> Choice:
    if wanted not in ("auto", *NAMES):
        raise UsageError(f"unknown accelerator {wanted!r}", hint=f"one of auto, {', '.join(NAMES)}")
    native = _NATIVE.get(host.system, "tcg")
    name = native if wanted == "auto" else wanted
    verdict = probe_accelerator(name, arch, features, kernel, initrd, host=host, prover=prover)
    if verdict.usable:
        return Choice(name, None, (verdict,))
    if wanted != "auto":
        raise AcceleratorError(f"{_TITLES[name]} cannot be used: {verdict.reason}",
                               hint=verdict.hint or "start with --accel auto", details=verdict.details)
    fallback = probe_accelerator("tcg", arch, features, kernel, initrd, host=host, prover=prover)
    if not fallback.usable:
        raise AcceleratorError(f"no accelerator can be used: {verdict.reason}; {fallback.reason}", hint=fallback.hint)
    note = None
    if _is_native(arch, host):  # nobody expects another architecture to be anything but emulated
        note = f"{_TITLES[name]} cannot be used ({verdict.reason}): using {_TITLES['tcg']}, which is much slower"
    return Choice("tcg", note, (verdict, fallback))


def probe_accelerator(
    accel: str,
    arch: Arch,
    features: QemuFeatures,
    kernel: Path | None,
    initrd: Path | None,
    *,
    host: Host | None = None,
    prover: Prover = run_proof,
) -> Verdict:
    """Whether `accel` runs a guest of `arch` here, and how that is known. At most 3 s, once per boot of the host."""
    host = host or this_host()
    if accel not in features.accels:
        system = "macOS" if accel == "hvf" else "Linux"
        if accel != "tcg" and _NATIVE.get(host.system) != accel:
            return _unusable(accel, f"it exists only on {system}", "looked at the host's system")
        if accel == "tcg" or _is_native(arch, host):
            return _unusable(accel, f"{features.binary} was built without it", "asked QEMU",
                             hint="use the QEMU of a distribution that has it")
    if accel == "tcg":
        return Verdict("tcg", True, None, "compiled into QEMU; needs nothing of the host", 0.0)
    if not _is_native(arch, host):
        return _unusable(accel, f"it runs only {host.machine} guests on this host", "compared the architectures",
                         hint=f"{arch.name} guests are emulated: --accel tcg")
    obstacle = _kvm_obstacle(host) if accel == "kvm" else _hvf_obstacle(host)
    return obstacle or _proven(accel, features, kernel, initrd, host=host, prover=prover)


def _is_native(arch: Arch, host: Host) -> bool:
    return find_arch(host.machine) == arch


def _unusable(accel: str, reason: str, proof: str, *, hint: str | None = None) -> Verdict:
    return Verdict(accel, False, reason, proof, 0.0, hint=hint)


def _kvm_obstacle(host: Host) -> Verdict | None:
    """What keeps this user from /dev/kvm; None where it opens (which proves nothing yet)."""
    device = host.kvm_device()
    if not device.exists:
        return _unusable("kvm", "there is no /dev/kvm", "looked for /dev/kvm",
                         hint="switch virtualisation on in the firmware setup (a VM or container as host: give it "
                              "nested virtualisation or --device /dev/kvm), then sudo modprobe kvm_intel or kvm_amd")
    if device.denied and device.group:
        join = "log out and in again" if device.listed else f"sudo usermod -aG {device.group} $USER, then log in again"
        return _unusable("kvm", f"no permission for /dev/kvm, which belongs to the group {device.group}",
                         "opened /dev/kvm", hint=join)
    if device.denied:
        return _unusable("kvm", "no permission for /dev/kvm, which only its owner may use", "opened /dev/kvm",
                         hint="sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm && sudo usermod -aG kvm $USER, "
                              "then log in again")
    if device.error:
        return _unusable("kvm", f"/dev/kvm does not open: {device.error}", "opened /dev/kvm",
                         hint="see `sudo dmesg | grep -i kvm`")
    return None


def _hvf_obstacle(host: Host) -> Verdict | None:
    if host.sysctl("kern.hv_support") != "1":
        return _unusable("hvf", "this Mac offers no hypervisor to programs", "asked sysctl kern.hv_support",
                         hint="on a Mac inside a VM, switch nested virtualisation on")
    return None


def _proven(
    accel: str, features: QemuFeatures, kernel: Path | None, initrd: Path | None, *, host: Host, prover: Prover
) -> Verdict:
    if kernel is None or initrd is None:
        kernel = initrd = None
    guest = ":".join(file_identity(path) for path in (kernel, initrd) if path) or "firmware"
    name = f"accel-{accel}-{hashlib.sha256(f'{features.binary}:{kernel}'.encode()).hexdigest()[:16]}.json"
    key = f"{host.boot_id()}:{features.build}:{guest}"
    known = _remembered(name, key)
    if known is not None:
        return known
    outcome = prover(features, Trial(accel, kernel, initrd))
    log.info("%s: %s", accel, outcome.evidence)
    verdict = Verdict(accel, outcome.proven, outcome.reason, outcome.evidence, outcome.seconds,
                      hint=_mend(accel, outcome), details=outcome.words[-2000:] or None)
    until = None if outcome.conclusive else time.time() + DOUBT_LASTS
    save_entry(name, key, {**verdict.to_dict(), "until": until})
    return verdict


def _remembered(name: str, key: str) -> Verdict | None:
    value = load_entry(name, key)
    if value is None:
        return None
    try:
        until = value.pop("until")
        if until is not None and not time.time() < float(until) <= time.time() + DOUBT_LASTS:
            return None
        verdict = Verdict(**value)
    except (KeyError, TypeError, ValueError):
        return None  # damaged, or of another version: found out again
    return replace(verdict, cached=True)


def _mend(accel: str, outcome: Outcome) -> str | None:
    if outcome.proven:
        return None
    if accel == "hvf" and "HV_DENIED" in outcome.words:
        return "this QEMU lacks the hypervisor entitlement: brew reinstall qemu"
    if not outcome.conclusive:
        return "the host may have been busy; `qvm doctor` shows the verdict, which is found anew after an hour"
    return "the host's virtualisation is incomplete (common in nested VMs); guests run with --accel tcg"

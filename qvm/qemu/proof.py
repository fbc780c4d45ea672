"""The proof that an accelerator runs a guest: boot the real kernel under it for a moment and hear it say so.

The initramfs of qvm's images knows the word `qvm.proof` on the kernel command line: it prints `qvm-proof-ok` on the
console and powers off, before it looks at any disk. An image without such an initramfs gets a weaker check: firmware
runs for a moment and the machine must not fall into an error state. That a hypervisor can run firmware and still
fail on a kernel is known, so the outcome says which of the two it was.
"""

from __future__ import annotations

import json
import os
import select
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from qvm.arch import X86_64
from qvm.errors import HostError
from qvm.process import converse
from qvm.qemu.board import accelerator, arch_of, board
from qvm.qemu.features import QemuFeatures
from qvm.qemu.words import option
from qvm.wait import Deadline

PROOF_LINE = b"qvm-proof-ok"
PROOF_WORD = "qvm.proof"
PROOF_TIMEOUT = 3.0
FIRMWARE_TIME = 1.5
"""Seconds that firmware must run undisturbed in the weaker check."""

_BAD_STATES = ("internal-error", "io-error", "guest-panicked")


@dataclass(frozen=True, slots=True)
class Trial:
    """What to boot and for how long (seconds)."""

    accel: str
    kernel: Path | None
    initrd: Path | None
    timeout: float = PROOF_TIMEOUT

    @property
    def is_full(self) -> bool:
        return self.kernel is not None and self.initrd is not None


@dataclass(frozen=True, slots=True)
class Outcome:
    proven: bool
    evidence: str
    """One sentence: what was done and what was seen."""
    reason: str | None
    """Why not, in one line; None when proven."""
    words: str
    """All that QEMU said on standard error."""
    seconds: float
    conclusive: bool
    """False where only the time ran out: the host may have been busy."""


Prover = Callable[[QemuFeatures, Trial], Outcome]


def build_proof_argv(features: QemuFeatures, trial: Trial, monitor_fd: int) -> list[str]:
    """The smallest machine that runs a kernel: console on standard output, QMP on a descriptor. Pure."""
    arch = arch_of(features.arch)
    if trial.is_full:
        boot = ["-kernel", str(trial.kernel), "-initrd", str(trial.initrd),
                "-append", f"console={arch.console} {PROOF_WORD} panic=-1 quiet"]
    elif arch is not X86_64 and features.firmware is not None:
        boot = option("-drive", "if=pflash",
                      {"unit": 0, "format": "raw", "readonly": True, "file": features.firmware.code})
    else:
        boot = []  # q35 brings its own firmware
    return [
        str(features.binary),
        "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none",
        *option("-machine", arch.machine, board(arch, trial.accel, features)),
        *accelerator(arch, trial.accel, features),
        "-m", "256M",
        *boot,
        *option("-chardev", "stdio", {"id": "console", "signal": False}),
        "-serial", "chardev:console",
        *option("-chardev", "socket", {"id": "monitor", "fd": monitor_fd}),
        *option("-mon", "", {"chardev": "monitor", "mode": "control"}),
    ]


def run_proof(features: QemuFeatures, trial: Trial) -> Outcome:
    """Boot `trial` and watch it; QEMU is killed when the answer is known or the time is up."""
    began = time.monotonic()
    # The weaker check ends by time, so its time must lie within the whole.
    deadline = Deadline(trial.timeout if trial.is_full else min(FIRMWARE_TIME, trial.timeout), "the proof")
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.TemporaryFile() as words:
        try:
            with converse(build_proof_argv(features, trial, theirs.fileno()), stderr=words, stdin=False,
                          pass_fds=(theirs.fileno(),)) as child:
                theirs.close()
                assert child.stdout is not None
                watch = _Watch(child.stdout, ours)
                watch.until_decided(deadline)
                ended = watch.console_ended or child.poll() is not None
        except HostError as error:
            return Outcome(False, "QEMU did not start", error.message, "", time.monotonic() - began, True)
        words.seek(0)
        said = words.read().decode(errors="replace").strip()
    return _judge(trial, watch, said, seconds=time.monotonic() - began, ended=ended)


def _judge(trial: Trial, watch: _Watch, said: str, *, seconds: float, ended: bool) -> Outcome:
    what = f"booted {trial.kernel}" if trial.is_full else "ran firmware only (no kernel to prove it with)"
    what = f"{what} under {trial.accel}"
    if watch.proven:
        return Outcome(True, f"{what}: the guest answered after {seconds:.1f} s", None, said, seconds, True)
    if watch.bad_state or ended:
        if telling := summarise(said):
            reason = f"QEMU: {telling}"
        elif watch.bad_state:
            reason = f"the machine went into state {watch.bad_state}"
        else:
            reason = "the guest ended without an answer"
        return Outcome(False, f"{what}: it failed after {seconds:.1f} s", reason, said, seconds, True)
    if not trial.is_full:
        return Outcome(True, f"{what}: undisturbed for {seconds:.1f} s, a weak proof", None, said, seconds, True)
    return Outcome(False, f"{what}: no answer within {seconds:.1f} s",
                   f"a guest did not start within {trial.timeout:g} s", said, seconds, False)


@dataclass(slots=True)
class _Watch:
    """What the console and the monitor have told so far."""

    console: IO[bytes]
    monitor: socket.socket
    proven: bool = False
    console_ended: bool = False
    bad_state: str | None = None
    _seen: bytes = b""
    _lines: bytearray = field(default_factory=bytearray)

    def until_decided(self, deadline: Deadline) -> None:
        self._ask("qmp_capabilities")
        waiter = select.poll()
        waiter.register(self.console.fileno(), select.POLLIN)
        waiter.register(self.monitor.fileno(), select.POLLIN)
        while not (self.proven or self.console_ended or self.bad_state or deadline.passed):
            for fd, _ in waiter.poll(deadline.left * 1000):
                if fd == self.console.fileno():
                    self._read_console()
                elif not self._read_monitor():
                    waiter.unregister(fd)

    def _ask(self, command: str) -> None:
        # A QEMU that has died is noticed by its console.
        with suppress(OSError):
            self.monitor.sendall(json.dumps({"execute": command}).encode())

    def _read_console(self) -> None:
        chunk = os.read(self.console.fileno(), 65536)
        self.console_ended = not chunk
        self._seen = (self._seen + chunk)[-65536 - len(PROOF_LINE):]
        self.proven = PROOF_LINE in self._seen

    def _read_monitor(self) -> bool:
        try:
            chunk = self.monitor.recv(65536)
        except OSError:
            return False
        self._lines += chunk
        *lines, rest = bytes(self._lines).split(b"\n")
        self._lines[:] = rest
        for line in lines:
            self._hear(line)
        return bool(chunk)

    def _hear(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except ValueError:
            return
        # Why the machine stopped is not in the event; ask.
        if message.get("event") in ("STOP", "GUEST_PANICKED"):
            self._ask("query-status")
        answer = message.get("return")
        if isinstance(answer, dict) and answer.get("status") in _BAD_STATES:
            self.bad_state = str(answer["status"])


def summarise(words: str) -> str | None:
    """The line of QEMU's standard error that tells most, without the program's name in front."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    if not lines:
        return None
    telling = next((line for line in lines if "error" in line.lower()), lines[0])
    name, colon, rest = telling.partition(": ")
    text = rest if colon and Path(name).name.startswith("qemu-") else telling
    return text.removeprefix("error: ")[:200]

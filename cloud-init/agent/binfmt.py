"""Emulation of other architectures' programs, as the kernel's binfmt_misc and systemd's unit have it."""

import os

from .base import Failure, log
from .files import read
from .kernel import write_kernel
from .programs import run_program

BINFMT = "/proc/sys/fs/binfmt_misc"
UNIT = "qvm-binfmt.service"


def emulators():
    """Names of QEMU's entries that are on; none where the kernel's file system is not mounted."""
    try:
        names = sorted(name for name in os.listdir(BINFMT) if name.startswith("qemu-"))
    except OSError:
        return []
    return [name for name in names if (read(f"{BINFMT}/{name}") or b"").startswith(b"enabled")]


def set_emulation(enabled):
    """Switch it on (waiting for the unit where the image has it) or off, for good until told otherwise or rebooted."""
    if os.path.isdir("/run/systemd/system") and os.path.exists(f"/usr/lib/systemd/system/{UNIT}"):
        try:
            # After it was switched off, "restart" registers what "start" takes for done.
            run_program(["systemctl", "start" if enabled else "stop", UNIT])
            if enabled and not emulators():
                run_program(["systemctl", "restart", UNIT])
        except Failure as error:
            log(UNIT, error)
    if not enabled:
        for name in emulators():
            write_kernel(f"{BINFMT}/{name}", "-1")
    return {"emulators": emulators()}

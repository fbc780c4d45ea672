"""Addresses in the network that instances of one QVM_HOME share; each keeps its number for as long as it exists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qvm import paths
from qvm.errors import InstanceStateError, QvmError
from qvm.instance.record import Record
from qvm.instance.store import find_record, list_profiles, save_record
from qvm.locks import lock

PREFIX = "10.71.86"
"""A /24; the numbers are an instance's. 1 is left free."""
PREFIX6 = "fd71:766d:1:"
"""A /64 of the unique local addresses (RFC 4193)."""
_FIRST, _LAST = 2, 250


def address(number: int) -> str:
    return f"{PREFIX}.{number}"


def address6(number: int) -> str:
    return f"{PREFIX6}:{number:x}"


def mac(number: int) -> str:
    """Locally administered, below QEMU's prefix; an instance's other interface has a random one."""
    return f"52:54:00:71:86:{number:02x}"


def folder() -> Path:
    """Of the network's sockets, one pair for each machine in it."""
    return paths.home() / "_net"


def machine_socket(number: int) -> Path:
    """Where QEMU takes frames."""
    return folder() / f"{number}.q"


def switch_socket(number: int) -> Path:
    """Where the machine's supervisor takes frames from its QEMU."""
    return folder() / f"{number}.s"


def with_number(record: Record) -> Record:
    """The record with a number of its own, kept where it has one; saved at once, so that nobody else takes it."""
    with lock(paths.instances_dir() / ".network.lock", what="the list of network addresses", timeout=30):
        taken = {number for profile in list_profiles() if profile != record.config.profile
                 if (number := _number_of(profile))}
        number = record.network_number
        if not number or number in taken:
            number = next((each for each in range(_FIRST, _LAST + 1) if each not in taken), 0)
        if not number:
            raise QvmError(f"all {_LAST - _FIRST + 1} network addresses are taken",
                           hint="`qvm delete` frees those of instances that are not needed any more")
        record = replace(record, network_number=number)
        save_record(record)
    return record


def _number_of(profile: str) -> int:
    try:
        record = find_record(profile)
    except InstanceStateError:
        return 0  # damaged: it cannot run
    return record.network_number if record is not None else 0

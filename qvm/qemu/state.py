"""The device state of a machine, without its RAM: saved in milliseconds, restored in milliseconds.

QEMU's own `migrate` would read every page of the RAM, the holes of a RAM file included. Where the RAM is a file that
stays, the devices are all that has to be written, and `xen-save-devices-state` (QAPI, migration.json) writes just them;
it is part of every build. A machine begun with `InstanceSpec.incoming` takes such a file as a migration that has no
header; the RAM it needs is mapped already (`InstanceSpec.ram_file`).
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from qvm.errors import QemuError
from qvm.qemu.features import QemuFeatures
from qvm.qemu.monitor import Event, Monitor

SAVE_TIMEOUT = 60.0
RESTORE_TIMEOUT = 60.0
# `file:` is understood from here on; older ones take a descriptor, which newer ones call deprecated.
_FILE_URIS = (8, 2, 0)


class RestoreError(QemuError):
    """The saved state is to blame: it does not fit the machine, or is damaged."""

    code = "restore"


async def save_devices(monitor: Monitor, path: Path) -> None:
    """Write the device state of a paused machine to `path` (0600). The machine stays paused, its disks its own.

    Raises QemuError where QEMU refuses, or where the file could not be written whole.
    """
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
    await monitor.execute("xen-save-devices-state", {"filename": str(path), "live": False}, timeout=SAVE_TIMEOUT)


async def restore_devices(
    monitor: Monitor, path: Path, features: QemuFeatures, *, timeout: float = RESTORE_TIMEOUT
) -> None:
    """Load a device state into a machine that was started with `incoming`; it is paused then, not yet running.

    Raises RestoreError with QEMU's reason where the state does not fit the machine or is damaged.
    """
    outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def see(event: Event) -> None:
        status = event.get("data", {}).get("status")
        if event.get("event") == "MIGRATION" and status in ("completed", "failed") and not outcome.done():
            outcome.set_result(str(status))

    def end(_: asyncio.Future[str]) -> None:
        if not outcome.done():
            outcome.set_result("gone")

    await monitor.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
    monitor.closed.add_done_callback(end)
    try:
        with monitor.subscribed(see):
            await monitor.execute("migrate-incoming", {"uri": await _source(monitor, path, features)})
            async with asyncio.timeout(timeout):
                result = await outcome
    except TimeoutError:
        raise RestoreError(f"QEMU did not restore {path.name} within {timeout:g} s") from None
    except QemuError as error:
        raise RestoreError(f"QEMU could not restore the saved state: {error.message}") from error
    finally:
        monitor.closed.remove_done_callback(end)
    if result == "completed":
        return
    reason = "it ended" if result == "gone" else await _reason(monitor)
    raise RestoreError(f"QEMU could not restore the saved state: {reason}")


async def _source(monitor: Monitor, path: Path, features: QemuFeatures) -> str:
    if features.version >= _FILE_URIS:
        return f"file:{path}"
    await monitor.give_file(path, "state")
    return "fd:state"


async def _reason(monitor: Monitor) -> str:
    """Why it failed, as QEMU has it, which may end while it is being asked."""
    try:
        answer = await monitor.execute("query-migrate")
    except QemuError:
        return "it does not fit the machine, or is damaged (`qvm logs supervisor` has QEMU's words)"
    return str(answer.get("error-desc", "it did not say why"))

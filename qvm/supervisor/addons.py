"""Add-ons of a machine that is up: put on, stopped, emptied, taken off."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from qvm.errors import UsageError
from qvm.instance.store import load_record
from qvm.log import get_logger
from qvm.runtime.base import Guest, Runtime, RuntimeContext
from qvm.runtime.checking import wait_for_checks
from qvm.runtime.stack import Stack, load_stack
from qvm.supervisor.context import runtime_context
from qvm.supervisor.control import Handler, Send

if TYPE_CHECKING:
    from qvm.supervisor.core import Supervisor

log = get_logger(__name__)

DATA_DISK = "/var/lib/qvm"
"""Where the guest has its data disk (cloud-init/agent/disks.py)."""
ACTIONS = ("start", "stop", "reset", "delete")

# At a boot the agent does this for all folders of the profile's runtimes.
_BIND = f"""
mountpoint -q {DATA_DISK} || exit 0
for folder; do
    mountpoint -q "$folder" && continue
    mkdir -p "$folder" "{DATA_DISK}$folder" && mount --bind "{DATA_DISK}$folder" "$folder" || exit 1
done
"""


class Addons:
    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._one_at_a_time = asyncio.Lock()

    async def act(self, name: str, action: str) -> dict[str, Any]:
        """Do `action` with the add-on `name`, as the instance's record has it now; returns version and notes."""
        if action not in ACTIONS:
            raise UsageError(f"unknown action {action!r}")
        supervisor = self._supervisor
        guest = supervisor.machine().channel
        async with self._one_at_a_time:
            supervisor.record = load_record(supervisor.profile)
            stack, context = load_stack(supervisor.record.config), runtime_context(supervisor.record)
            addon, own = _find(stack, context, name)
            if action == "start":
                await self._set_primary(guest, stack, context)
                await self._start(guest, addon, own)
            elif action == "reset":
                await addon.reset(guest, own)
                await self._start(guest, addon, own)
            elif action == "stop":
                await addon.stop(guest, own)
            else:
                await addon.teardown(guest, own)
            if action in ("stop", "delete"):
                await asyncio.to_thread(addon.deactivate, own, remove=action == "delete")
                stack = stack.without(name)
            if action == "delete":
                await self._set_primary(guest, stack, context)
            return await self._settle(guest, stack, context)

    async def _set_primary(self, guest: Guest, stack: Stack, context: RuntimeContext) -> None:
        """The runtime under the add-ons, with the settings they need; started anew where these have changed."""
        primary, own = stack.parts(context)[0]
        await primary.provision(guest, own)
        await wait_for_checks(primary, guest, own)

    async def _start(self, guest: Guest, addon: Runtime, own: RuntimeContext) -> None:
        await guest.exec(["sh", "-c", _BIND, "bind", *map(str, addon.data_folders)])
        await addon.provision(guest, own)
        await addon.start(guest, own)
        await wait_for_checks(addon, guest, own)

    async def _settle(self, guest: Guest, stack: Stack, context: RuntimeContext) -> dict[str, Any]:
        """Have the rest of the supervisor go by what there is now."""
        supervisor = self._supervisor
        notes: list[str] = []
        supervisor.runtime, supervisor.context = stack, context
        assert supervisor.publishing is not None, "the machine is up"
        await supervisor.publishing.renew(stack, context, notes.append, switch=supervisor.record.config.activate)
        version = await stack.version(guest, context)
        supervisor.note_version(version)
        return {"runtime_version": version, "notes": notes, "ports": supervisor.publishing.ports()}


def _find(stack: Stack, context: RuntimeContext, name: str) -> tuple[Runtime, RuntimeContext]:
    for layer, own in stack.parts(context)[1:]:
        if layer.name == name:
            return layer, own
    raise UsageError(f"this instance has no {name}", hint="qvm kubernetes start")


def addon_handlers(supervisor: Supervisor) -> dict[str, Handler]:
    addons = Addons(supervisor)

    async def addon(request: dict[str, Any], send: Send) -> dict[str, Any]:
        return await addons.act(str(request["name"]), str(request["action"]))

    return {"addon": addon}

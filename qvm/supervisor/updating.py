"""`qvm update` on the supervisor's side: the runtimes' packages in the guest."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qvm.instance.store import save_run
from qvm.runtime.checking import wait_for_checks
from qvm.supervisor.control import Handler, Send

if TYPE_CHECKING:
    from qvm.supervisor.core import Supervisor


def update_handlers(supervisor: Supervisor) -> dict[str, Handler]:
    one_at_a_time = asyncio.Lock()

    async def update(request: dict[str, Any], send: Send) -> dict[str, Any]:
        """Update and wait until the runtime answers again. The guest's own lock of packages keeps others out."""
        channel = supervisor.require_link().channel
        async with one_at_a_time:
            changes = await supervisor.runtime.update(channel, supervisor.context)
            if changes:
                await wait_for_checks(supervisor.runtime, channel, supervisor.context)
                version = await supervisor.runtime.version(channel, supervisor.context)
                if supervisor.run is not None:
                    supervisor.run = replace(supervisor.run, runtime_version=version)
                    save_run(supervisor.profile, supervisor.run)
        return {"changes": changes, "runtime_version": supervisor.run.runtime_version if supervisor.run else ""}

    return {"update": update}

"""Wait until what a runtime says must answer does."""

from __future__ import annotations

import asyncio

from qvm.errors import NotReadyError
from qvm.runtime.base import Guest, ReadyCheck, Runtime, RuntimeContext
from qvm.wait import backoff


async def wait_for_checks(runtime: Runtime, guest: Guest, context: RuntimeContext) -> None:
    """Each of the runtime's checks in turn; NotReadyError, with its hint, for one that does not hold in its time."""
    for check in runtime.checks(context):
        try:
            async with asyncio.timeout(check.timeout) as deadline:
                await _hold(check, guest, context)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise NotReadyError("runtime", f"{check.name} in the guest did not answer within {check.timeout:g} s",
                                hint=check.hint) from error


async def _hold(check: ReadyCheck, guest: Guest, context: RuntimeContext) -> None:
    for pause in backoff():
        if await check.check(guest, context):
            return
        await asyncio.sleep(pause)

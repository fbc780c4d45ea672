"""No runtime: a plain Linux VM."""

from __future__ import annotations

from qvm.runtime.base import Guest, Runtime, RuntimeContext


class NoRuntime(Runtime):
    name = "none"
    summary = "a plain Linux VM without containers"

    async def provision(self, guest: Guest, context: RuntimeContext) -> None:
        """Nothing is needed."""

    async def start(self, guest: Guest, context: RuntimeContext) -> None:
        """Nothing is started."""

    async def ready(self, guest: Guest, context: RuntimeContext) -> bool:
        return True

    async def stop(self, guest: Guest, context: RuntimeContext) -> None:
        """Nothing runs."""

    async def version(self, guest: Guest, context: RuntimeContext) -> str:
        return "none"

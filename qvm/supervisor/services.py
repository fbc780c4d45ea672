"""What a supervisor does for a machine beside its runtime: emulators, names."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from qvm.guest.channel import AgentChannel
from qvm.instance.record import Record
from qvm.qemu.monitor import Monitor
from qvm.runtime.network import Network
from qvm.supervisor.emulation import Emulation
from qvm.supervisor.hostnetwork import AGENT_SOCKET
from qvm.supervisor.names import NameService
from qvm.supervisor.sharednet import SharedNetwork


class Services:
    """Of one machine: `settle` before it counts as ready, `begin` from then on, `end` when it goes."""

    def __init__(self, record: Record, network: Network) -> None:
        self._config = record.config
        self.emulation = Emulation(enabled=record.config.binfmt)
        self.network = SharedNetwork(record)
        self.names = NameService(record, network)

    async def settle(self, monitor: Monitor | None, channel: AgentChannel, *, fresh: bool = False) -> None:
        """`fresh`: the guest is a new fork. QvmError where what the profile wants cannot be had."""
        if self._config.forward_agent:
            await channel.exec(["mkdir", "-p", str(PurePosixPath(AGENT_SOCKET).parent)])
        assert monitor is not None, "launched before"
        await self.network.join(monitor, channel)
        await self.names.settle(channel, fresh=fresh)

    def begin(self, channel: AgentChannel) -> None:
        self.emulation.begin(channel)
        self.names.begin(channel)

    def end(self) -> None:
        self.emulation.end()
        self.names.end()
        self.network.end()

    def status(self) -> dict[str, Any]:
        return {"binfmt": self.emulation.platforms, "dns": self.names.status(), "network": self.network.status()}

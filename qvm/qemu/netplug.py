"""A second network card, plugged into a machine that runs: its frames are datagrams on unix sockets.

A datagram socket has no connection that could break: whoever serves the other end may go and come again.
Source: qemu(1), `-netdev dgram` (QEMU 7.2 and later).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qvm.arch import Bus
from qvm.errors import QemuError
from qvm.log import get_logger
from qvm.qemu.bus import virtio
from qvm.qemu.devices import SPARE_PORTS
from qvm.qemu.monitor import Monitor

log = get_logger(__name__)

CARD, NETDEV = "nic1", "net1"
UNPLUG_TIMEOUT = 20.0
"""Seconds. Native PCI Express hot-plug waits five for somebody to press the button again."""


async def is_plugged(monitor: Monitor) -> bool:
    return any(entry["name"] == CARD for entry in await monitor.execute("qom-list", {"path": "/machine/peripheral"}))


async def plug_network(monitor: Monitor, bus: Bus, *, mac: str, here: Path, there: Path) -> None:
    """Have the guest see a card that QEMU reads at `here` and writes to `there`. QemuError where QEMU is too old."""
    ends: dict[str, Any] = {"local": {"type": "unix", "path": str(here)},
                            "remote": {"type": "unix", "path": str(there)}}
    await _drop_backend(monitor)
    await monitor.execute("netdev_add", {"type": "dgram", "id": NETDEV, **ends})
    port = {"bus": f"port{SPARE_PORTS - 1}"} if bus == "pcie" else {}
    rom = {} if bus == "ccw" else {"romfile": ""}
    try:
        await monitor.device_add(virtio("net", bus), CARD, netdev=NETDEV, mac=mac, **port, **rom)
    except BaseException:
        await monitor.execute("netdev_del", {"id": NETDEV})
        raise


async def _drop_backend(monitor: Monitor) -> None:
    """One that is left where the guest let go of the card too late for `unplug_network`."""
    try:
        await monitor.execute("netdev_del", {"id": NETDEV})
    except QemuError as error:
        log.debug("as a rule there is none: %s", error.message)


async def unplug_network(monitor: Monitor) -> None:
    await monitor.device_del(CARD, timeout=UNPLUG_TIMEOUT)
    await monitor.execute("netdev_del", {"id": NETDEV})

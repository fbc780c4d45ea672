"""A machine's place in the network that instances share: its card, its address, its part of the switch."""

from __future__ import annotations

from typing import Any

from qvm import paths
from qvm.arch import find_arch
from qvm.errors import GuestError, QvmError
from qvm.guest.channel import AgentChannel
from qvm.instance import netaddr
from qvm.instance.record import Record
from qvm.log import get_logger
from qvm.qemu.monitor import Monitor
from qvm.qemu.netplug import is_plugged, plug_network, unplug_network
from qvm.supervisor.switch import Switch

log = get_logger(__name__)

CONFIGURE_TIMEOUT = 60.0

# The card comes a moment after QEMU has it. Duplicate detection would keep the IPv6 address from use for a second.
_CONFIGURE = """
left=200
while :; do
    for each in /sys/class/net/*; do
        read -r found <"$each/address" && [ "$found" = "$1" ] && name=${each##*/} && break 2
    done
    left=$((left - 1)); [ $left -gt 0 ] || { echo "the network card did not come" >&2; exit 1; }
    sleep 0.05
done
ip link set "$name" up
ip address replace "$2/24" dev "$name"
[ ! -d /proc/sys/net/ipv6 ] || ip -6 address replace "$3/64" dev "$name" nodad
echo "$name"
"""


class SharedNetwork:
    """Of one machine; does nothing where the profile has no `networkAddress`."""

    def __init__(self, record: Record) -> None:
        self._number = record.network_number if record.config.network_address else 0
        self._arch = find_arch(record.config.arch)
        self._switch: Switch | None = None
        self._name = ""
        self._monitor: Monitor | None = None

    @property
    def address(self) -> str | None:
        return netaddr.address(self._number) if self._number else None

    async def join(self, monitor: Monitor, channel: AgentChannel) -> None:
        """Have the machine in the network, whatever of that holds already. QvmError."""
        if not self._number:
            return
        assert self._arch is not None, "validated when the record was made"
        self._monitor = monitor
        if self._switch is None:
            paths.ensure_private_dir(netaddr.folder())
            self._switch = Switch(self._number)
        if not await is_plugged(monitor):
            await plug_network(monitor, self._arch.bus, mac=netaddr.mac(self._number),
                               here=netaddr.machine_socket(self._number), there=netaddr.switch_socket(self._number))
        done = await channel.exec(["sh", "-c", _CONFIGURE, "configure", netaddr.mac(self._number),
                                   netaddr.address(self._number), netaddr.address6(self._number)],
                                  timeout=CONFIGURE_TIMEOUT, check=False)
        if done.exit_code != 0:
            raise GuestError("the guest could not be given its network address",
                             details=done.stderr.decode(errors="replace").strip() or None)
        self._name = done.stdout.decode().strip()
        log.info("%s has the address %s", self._name, self.address)

    async def leave(self) -> None:
        """Take the card out: a machine is saved without it. QemuError where the guest does not let go of it."""
        if self._monitor is not None and self._number and await is_plugged(self._monitor):
            await unplug_network(self._monitor)

    async def rejoin(self, channel: AgentChannel) -> None:
        """After `leave`, where the machine runs on; what fails is logged, since what was asked for is done."""
        if self._monitor is None or not self._monitor.is_open:
            return
        try:
            await self.join(self._monitor, channel)
        except QvmError:
            log.exception("the machine has no network address any more")

    def end(self) -> None:
        """QEMU has gone or will be adopted by another supervisor."""
        if self._switch is not None:
            self._switch.close()
        self._switch = self._monitor = None

    def forget(self) -> None:
        """QEMU has gone, and its socket with it."""
        if self._number:
            netaddr.machine_socket(self._number).unlink(missing_ok=True)

    def status(self) -> dict[str, Any]:
        if not self._name:
            return {}
        return {"address": netaddr.address(self._number), "address6": netaddr.address6(self._number),
                "interface": self._name}

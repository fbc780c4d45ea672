"""What names mean in the guest, kept true while it runs: the host's search domains, other instances, the profile's own.

The guest's name server is QEMU's, which asks the host's first one and notices by itself when that is another. What it
cannot know is followed here: every `INTERVAL` seconds a few files are looked at, and the guest hears of differences.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from qvm.config.dns import is_address
from qvm.errors import QvmError
from qvm.filenames import Files
from qvm.guest.channel import AgentChannel
from qvm.instance.netaddr import address
from qvm.instance.record import Record
from qvm.instance.store import find_record, list_profiles, load_run
from qvm.log import get_logger
from qvm.process import Identity, is_alive
from qvm.runtime.hostnames import apply_hosts, apply_network
from qvm.runtime.network import GATEWAY, Network
from qvm.supervisor.hostnetwork import profile_name, static_hosts
from qvm.supervisor.hostresolver import HostResolver, reachable_server, read_resolver

log = get_logger(__name__)

INTERVAL = 2.0
RESOLVE_INTERVAL = 60.0
"""Seconds after which names that stand for names of the host's are looked up again."""


class Neighbours:
    """The other instances that run, by what their folders say; a file is read once for each start."""

    def __init__(self, profile: str) -> None:
        self._profile = profile
        self._seen: dict[str, tuple[int, Identity | None]] = {}

    def running(self) -> list[str]:
        found = []
        for profile in list_profiles():
            try:
                stamp = Files(profile).run.stat().st_mtime_ns
            except OSError:
                self._seen.pop(profile, None)
                continue
            if self._seen.get(profile, (0, None))[0] != stamp:
                run = load_run(profile)
                self._seen[profile] = stamp, run.qemu if run is not None else None
            qemu = self._seen[profile][1]
            if profile != self._profile and qemu is not None and is_alive(qemu):
                found.append(profile)
        return found


class NameService:
    """Of one machine."""

    def __init__(
        self, record: Record, network: Network, *, resolver: Callable[[], HostResolver] = read_resolver,
    ) -> None:
        self._config = record.config
        self._address = address(record.network_number) if self._config.network_address else None
        self._network = network
        self._resolver = resolver
        self._neighbours = Neighbours(record.config.profile)
        self._task: asyncio.Task[None] | None = None
        self._applied: tuple[Network | None, dict[str, str] | None] = None, None
        self._looked_up: tuple[float, dict[str, str]] = -RESOLVE_INTERVAL, {}

    async def settle(self, channel: AgentChannel, *, fresh: bool) -> None:
        """Before the machine counts as ready: what the profile says of names holds from then on.

        `fresh`: the guest has just been given its seed and nothing else yet. QvmError.
        """
        plain = replace(self._network, search=(), wildcards={}, domains={}, host_loopback=True, gateway=GATEWAY)
        self._applied = (plain, static_hosts(self._config)) if fresh else (None, None)
        network, hosts = await asyncio.to_thread(self._wanted)
        if fresh and self._address is None and not self._has_aliases():
            hosts = static_hosts(self._config)  # other instances' names can come a moment later
        if network != plain or fresh:
            await self._apply(channel, network, hosts)

    def begin(self, channel: AgentChannel) -> None:
        self.end()
        self._task = asyncio.create_task(self._follow(channel), name="names")

    def end(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def status(self) -> dict[str, Any]:
        network, hosts = self._applied
        if network is None or hosts is None:
            return {}
        return {"nameservers": list(network.nameservers), "search": list(network.search),
                "domains": {domain: list(servers) for domain, servers in network.domains.items()},
                "hosts": dict(hosts) | {f"*.{name}": address for name, address in network.wildcards.items()},
                "host_loopback": network.host_loopback}

    async def _follow(self, channel: AgentChannel) -> None:
        while True:
            try:
                await self._apply(channel, *await asyncio.to_thread(self._wanted))
            except (QvmError, OSError) as error:
                log.warning("names in the guest are not up to date: %s", error)
            await asyncio.sleep(INTERVAL)

    async def _apply(self, channel: AgentChannel, network: Network, hosts: dict[str, str]) -> None:
        before, known = self._applied
        if network != before:
            await apply_network(channel, network, before=before)
            log.info("names: search %s, domains %s", network.search, network.domains)
        if hosts != known:
            await apply_hosts(channel, hosts)
        self._applied = network, hosts

    def _wanted(self) -> tuple[Network, dict[str, str]]:
        """Looks at files of the host's."""
        host = self._resolver()
        split = {domain: tuple(map(reachable_server, servers)) for domain, servers in host.domains.items()}
        network = replace(
            self._network, search=host.search, domains={**split, **self._network.domains},
            nameservers=self._network.nameservers if self._config.dns else host.for_guest(),
        )
        others = {profile_name(profile): self._address_of(profile) for profile in self._neighbours.running()}
        hosts = static_hosts(self._config)
        if self._address is not None:
            hosts[profile_name(self._config.profile)] = self._address
        return network, others | self._aliases(others | hosts) | hosts

    def _address_of(self, profile: str) -> str:
        """Where another instance is reached: at its own address where both have one, else by its forwarded ports, which
        are on the host's loopback."""
        other = find_record(profile) if self._address is not None else None
        if other is None or not other.config.network_address or not other.network_number:
            return GATEWAY
        return address(other.network_number)

    def _has_aliases(self) -> bool:
        return not all(map(is_address, self._config.dns_hosts.values()))

    def _aliases(self, hosts: Mapping[str, str]) -> dict[str, str]:
        """Names of the profile's that stand for other names: ours, or what the host makes of them."""
        wanted = {name: target for name, target in self._config.dns_hosts.items()
                  if "*" not in name and not is_address(target)}
        found = {name: hosts[target] for name, target in wanted.items() if target in hosts}
        rest = {name: target for name, target in wanted.items() if name not in found}
        if rest and not time.monotonic() - RESOLVE_INTERVAL < self._looked_up[0]:
            self._looked_up = time.monotonic(), {name: address for name, target in rest.items()
                                                 if (address := look_up(target)) is not None}
        return found | {name: address for name, address in self._looked_up[1].items() if name in rest}


def look_up(name: str) -> str | None:
    """The first IPv4 address, else the first, that the host knows for a name."""
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        return None
    return next((reachable_server(address) for address in sorted(found, key=lambda each: ":" in each)), None)

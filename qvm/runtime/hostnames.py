"""Names in the guest, for it and its containers, and what it reaches of the host's loopback.

Containers of any network ask the guest's name servers; a rule of the kernel's brings that to our own (dnsd.py), which
knows what stands in the guest's /etc/hosts. The guest's own programs read that file, and ask our server too where
domains have name servers of their own.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from qvm.runtime.base import Guest
from qvm.runtime.dnsd import MARK, RULES
from qvm.runtime.network import GATEWAY, Network

PROGRAM = PurePosixPath("/usr/lib/qvm/dnsd.py")
UNITS = PurePosixPath("/etc/systemd/system")
RESOLVER = PurePosixPath("/etc/resolv.conf")
# Link-local (RFC 3927), on the loopback interface: no listener on port 53 stands in a container's way to publish it.
ADDRESS, PORT = "169.254.53.53", 10053
_CLOSED = 9
"""A port of ADDRESS where nobody listens (discard, RFC 863)."""

_START = """
[ -d /run/systemd/system ] || exit 0
if [ "$1" = changed ]; then
    systemctl daemon-reload
    systemctl stop qvm-names.socket qvm-names.service
fi
exec systemctl start --no-block qvm-names.socket
"""

# The chain is ours, so that emptying it disturbs nobody; the tables are those that a new connection passes.
_RULES = """
set -e
ip address add {address}/32 dev lo 2>/dev/null || true
for each in iptables ip6tables; do
    if [ $each = iptables ]; then rules=$1; else rules=$2; fi
    $each -w -t nat -S QVM >/dev/null 2>&1 || [ -n "$rules" ] || continue
    printf '*nat\\n:QVM - [0:0]\\n%sCOMMIT\\n' "$rules" | $each-restore -w --noflush
    for hook in PREROUTING OUTPUT; do
        $each -w -t nat -C $hook -j QVM 2>/dev/null || $each -w -t nat -I $hook -j QVM
    done
done
"""

_HOSTS = """
set -e
keep=$(sed '/^# qvm begin/,/^# qvm end/d' /etc/hosts)
own=$(sed -n '/^# qvm begin/,/^# qvm end/{/^127\\.0\\.1\\.1[[:space:]]/p}' /etc/hosts)
printf '%s\\n# qvm begin\\n%s\\n%s# qvm end\\n' "$keep" "$own" "$1" >/etc/.hosts.qvm
chmod 0644 /etc/.hosts.qvm
mv -f /etc/.hosts.qvm /etc/hosts
"""


def names_digest() -> str:
    """Of the program that a machine with a runtime in it is frozen with."""
    return hashlib.sha256(Path(__file__).with_name("dnsd.py").read_bytes()).hexdigest()


async def serve_host_names(guest: Guest, network: Network) -> None:
    """Have containers know the guest's names. Where the guest has no systemd only --add-host does."""
    changed = await asyncio.gather(
        guest.write_file(PROGRAM, Path(__file__).with_name("dnsd.py").read_bytes()),
        guest.write_file(UNITS / "qvm-names.socket", names_socket(network)),
        guest.write_file(UNITS / "qvm-names.service", names_service()),
    )
    await guest.exec(["sh", "-c", _START, "start", "changed" if any(changed) else "same"])


async def apply_network(guest: Guest, network: Network, *, before: Network | None) -> None:
    """Have the guest resolve names as `network` says, and reach of the host what it says.

    `before`: what an earlier call said; None: nobody knows.
    """
    if before is None or resolver_file(network) != resolver_file(before):
        await guest.write_file(RESOLVER, resolver_file(network))
    if before is None or names_file(network) != names_file(before):
        await guest.write_file(PurePosixPath(RULES), names_file(network))
        if network.is_split():
            await serve_host_names(guest, network)
    rules = packet_rules(network)
    if rules != (None if before is None else packet_rules(before)):
        await guest.exec(["sh", "-c", _RULES.format(address=ADDRESS), "rules", *rules])


async def apply_hosts(guest: Guest, hosts: Mapping[str, str]) -> None:
    """Have the guest know these names, and no others by us but its own; ours are a block of its /etc/hosts."""
    text = "".join(f"{address} {name}\n" for name, address in hosts.items())
    await guest.exec(["sh", "-c", _HOSTS, "hosts", text])


def resolver_file(network: Network) -> bytes:
    """resolv.conf(5): at most six domains are looked in by older C libraries, and three servers are asked."""
    lines = [f"search {' '.join(network.search)}"] if network.search else []
    lines += [f"nameserver {server}" for server in network.nameservers]
    return "".join(f"{line}\n" for line in lines).encode()


def names_file(network: Network) -> bytes:
    lines = [f"address *.{domain} {address}" for domain, address in sorted(network.wildcards.items())]
    lines += [f"domain {domain} {' '.join(servers)}" for domain, servers in sorted(network.domains.items())]
    return "".join(f"{line}\n" for line in lines).encode()


def packet_rules(network: Network) -> tuple[str, str]:
    """Rules of our chain for IPv4 and IPv6: questions that go to our name server, and what is refused of the host.

    QEMU's user network leads every address of its own to the host's loopback, and 10.0.2.3, whatever the port, to the
    host's name server. Refused connections are sent to a closed port, so that who asks hears it at once. Only new
    connections pass here: answers to forwarded ones are not touched.
    """
    four, six = [], []
    if network.is_split():
        four += [f"-p udp --dport 53 -m mark ! --mark {MARK:#x} -d {server} -j DNAT --to-destination {ADDRESS}:{PORT}"
                 for server in network.nameservers if ":" not in server]
    if not network.host_loopback:
        prefix = GATEWAY.rpartition(".")[0]
        own = [f"{prefix}.0/24"] if network.gateway == GATEWAY else [f"{prefix}.0/24", network.gateway]
        four += ["-m addrtype --dst-type LOCAL -j RETURN"]
        four += [f"-p {kind} -d {prefix}.3 --dport 53 -j RETURN" for kind in ("udp", "tcp")]
        four += [f"-p tcp -d {GATEWAY} --dport {port} -j RETURN" for port in proxy_ports(network)]
        four += [f"-p {kind} -d {target} -j DNAT --to-destination {ADDRESS}:{_CLOSED}"
                 for target in own for kind in ("udp", "tcp")]
        six += ["-m addrtype --dst-type LOCAL -j RETURN", "-p udp -d fec0::3 --dport 53 -j RETURN"]
        six += [f"-p {kind} -d fec0::/64 -j DNAT --to-destination [::1]:{_CLOSED}" for kind in ("udp", "tcp")]
    elif network.gateway != GATEWAY:
        four.append(f"-d {network.gateway} -j DNAT --to-destination {GATEWAY}")
    return "".join(f"-A QVM {rule}\n" for rule in four), "".join(f"-A QVM {rule}\n" for rule in six)


def proxy_ports(network: Network) -> list[int]:
    """Ports of the host's loopback that are proxies the profile names: these stay reachable."""
    found = set()
    for address in network.proxies.values():
        parts = urlsplit(address)
        if parts.hostname == GATEWAY:
            found.add(parts.port or 80)
    return sorted(found)


def names_socket(network: Network) -> bytes:
    """Also makes and removes the rules: what containers ask the guest's name servers comes to us."""
    servers = [server for server in network.nameservers if ":" not in server]
    rule = f"PREROUTING -p udp --dport 53 -j DNAT --to-destination {ADDRESS}:{PORT} -d"
    lines = [
        "[Unit]", "Description=The host's names for containers", "DefaultDependencies=no", "",
        "[Socket]", f"ExecStartPre=-/bin/sh -c 'ip address add {ADDRESS}/32 dev lo 2>/dev/null'",
        f"ListenDatagram={ADDRESS}:{PORT}", "FreeBind=yes",
        *(f"ExecStartPost=-iptables -w -t nat -A {rule} {server}" for server in servers),
        *(f"ExecStopPost=-iptables -w -t nat -D {rule} {server}" for server in servers),
    ]
    return "\n".join([*lines, ""]).encode()


def names_service() -> bytes:
    return f"""[Unit]
Description=The host's names for containers
Requires=qvm-names.socket

[Service]
ExecStart=/usr/bin/python3 -I -S {PROGRAM}
""".encode()

"""`host.docker.internal` in containers: those of any network ask the guest's name server, which is made to know it."""

from __future__ import annotations

import asyncio
from pathlib import Path, PurePosixPath

from qvm.runtime.base import Guest
from qvm.runtime.network import HOST_NAMES, Network

PROGRAM = PurePosixPath("/usr/lib/qvm/dnsd.py")
UNITS = PurePosixPath("/etc/systemd/system")
# Link-local (RFC 3927), on the loopback interface: no listener on port 53 stands in a container's way to publish it.
ADDRESS, PORT = "169.254.53.53", 10053

_START = """
[ -d /run/systemd/system ] || exit 0
if [ "$1" = changed ]; then
    systemctl daemon-reload
    systemctl stop qvm-names.socket qvm-names.service
fi
exec systemctl start --no-block qvm-names.socket
"""


async def serve_host_names(guest: Guest, network: Network) -> None:
    """Have containers know the host by its names. Where the guest has no systemd only --add-host does."""
    changed = await asyncio.gather(
        guest.write_file(PROGRAM, Path(__file__).with_name("dnsd.py").read_bytes()),
        guest.write_file(UNITS / "qvm-names.socket", names_socket(network)),
        guest.write_file(UNITS / "qvm-names.service", names_service(network)),
    )
    await guest.exec(["sh", "-c", _START, "start", "changed" if any(changed) else "same"])


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


def names_service(network: Network) -> bytes:
    return f"""[Unit]
Description=The host's names for containers
Requires=qvm-names.socket

[Service]
ExecStart=/usr/bin/python3 -I -S {PROGRAM} {network.gateway} {" ".join(HOST_NAMES)}
""".encode()

"""containerd: containerd, nerdctl and BuildKit in the guest, as root; their sockets on the host."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from qvm.errors import GuestError
from qvm.runtime.base import Guest, HostSocket, Needs, Runtime, RuntimeContext
from qvm.runtime.hostnames import serve_host_names
from qvm.runtime.network import Network
from qvm.runtime.services import (
    find_version,
    install_packages,
    reload_units,
    restart_services,
    start_services,
    stop_services,
    upgrade_packages,
    wait_for_services,
)

from .files import buildkit_service, buildkit_socket, buildkitd_toml, containerd_toml, nerdctl_toml, registry_hosts

UPDATED = {
    "apt": "containerd runc containernetworking-plugins",
    "apk": "containerd runc nerdctl buildkit cni-plugins",
    "dnf": "containerd runc nerdctl buildkit containernetworking-plugins",
}
PACKAGES = {
    "apt": "containerd containernetworking-plugins iptables",
    "apk": "containerd nerdctl buildkit cni-plugins iptables",
    "dnf": "containerd nerdctl buildkit containernetworking-plugins iptables-nft",
}
UNITS = PurePosixPath("/etc/systemd/system")
CONFIG = PurePosixPath("/etc/containerd/config.toml")

# CNI's leases and results speak of network namespaces, none of which outlives a boot, and a guest's end leaves no time
# to remove them one by one: in memory they end with what they describe, and addresses and ports are never used up.
_LOOK = """
[ -L /var/lib/cni ] || { rm -rf /var/lib/cni; ln -s /run/cni /var/lib/cni; }
[ -d /run/cni ] || mkdir -m 700 /run/cni
for program in containerd nerdctl buildctl; do command -v $program >/dev/null && echo $program; done
echo buildkitd:$(command -v buildkitd)
for folder in /usr/lib/cni /opt/cni/bin /usr/libexec/cni; do [ -x $folder/bridge ] && echo cni:$folder; done
[ -d /run/systemd/system ] && echo systemd
for folder in /etc /usr/lib /lib; do [ -e $folder/systemd/system/buildkit.socket ] && echo unit:$folder; done
[ -S /run/containerd/containerd.sock ] && echo running
exit 0
"""

# Shims outlive containerd, so the containers are ended first; nerdctl is not started where there are none.
_STOP_CONTAINERS = """
set -- /run/containerd/io.containerd.runtime.v2.task/*/*
[ -d "$1" ] || exit 0
for namespace in $(ctr namespaces list -q); do
    containers=$(nerdctl --namespace "$namespace" ps -q)
    [ -z "$containers" ] || nerdctl --namespace "$namespace" stop --time 5 $containers
done
"""


# A BuildKit that runs has its id in memory already, and so keeps it: then it is a machine in use that is being copied.
_FORGET_IDS = """
rm -f /var/lib/containerd/io.containerd.grpc.v1.introspection/uuid
[ -S /run/buildkit/buildkitd.sock ] && [ -n "$(pidof buildkitd)" ] || rm -f /var/lib/buildkit/*/workerid
"""


class Containerd(Runtime):
    name = "containerd"
    summary = "containerd with nerdctl and BuildKit in the VM (`qvm nerdctl`)"
    needs = Needs(packages=PACKAGES, programs=("containerd",))
    sockets = (
        HostSocket("containerd", PurePosixPath("/run/containerd/containerd.sock")),
        HostSocket("buildkitd", PurePosixPath("/run/buildkit/buildkitd.sock")),
    )
    data_folders = (
        PurePosixPath("/var/lib/containerd"),
        PurePosixPath("/var/lib/nerdctl"),
        PurePosixPath("/var/lib/buildkit"),
    )
    commands = {  # noqa: RUF012  # a constant of the class, as the contract has it
        "nerdctl": ("sudo", "nerdctl"),
        "ctr": ("sudo", "ctr"),
        "buildctl": ("sudo", "buildctl"),
    }
    credential_variables = {"nerdctl": "DOCKER_CONFIG={folder}"}  # noqa: RUF012  likewise
    units = ("containerd.service", "buildkit.service")

    async def provision(self, guest: Guest, context: RuntimeContext) -> None:
        found = await self._look(guest)
        if "containerd" not in found or "cni" not in found:
            await install_packages(guest, PACKAGES, what="containerd")
            found = await self._look(guest)
        missing = [program for program in ("nerdctl", "buildctl", "buildkitd") if not found.get(program)]
        if missing:
            raise GuestError(
                f"the guest has no {', '.join(missing)}, and its distribution has no package for it",
                hint="use qvm's own image (--image debian-13), or --runtime docker",
            )
        config_changed, *_ = await asyncio.gather(
            self._configure(guest, context),
            guest.write_file(PurePosixPath("/etc/nerdctl/nerdctl.toml"), nerdctl_toml(cni_path=found["cni"])),
            serve_host_names(guest, context.network),
        )
        if "systemd" in found and found.get("unit", "/etc") == "/etc":
            await self._write_units(guest, found["buildkitd"])
        if config_changed and "running" in found:
            await restart_services(guest, ["containerd"])

    async def _configure(self, guest: Guest, context: RuntimeContext) -> bool:
        """The files that depend on the profile; True where containerd has to be started anew for it."""
        try:
            config = containerd_toml(context.settings)
        except ValueError as error:
            raise GuestError(f"the settings of the profile for containerd cannot be used: {error}",
                             hint=f"mend `containerd:` in {context.folder / 'qvm.yaml'}") from error
        changed, *_ = await asyncio.gather(
            guest.write_file(CONFIG, config),
            guest.write_file(PurePosixPath("/etc/buildkit/buildkitd.toml"), buildkitd_toml(context.network)),
            *(guest.write_file(path, data) for path, data in registry_hosts(context.network).items()),
        )
        return changed

    async def after_fork(self, guest: Guest, context: RuntimeContext) -> list[str]:
        """The machine that was frozen knew no profile. BuildKit has not run in it, and nerdctl reads at each call."""
        if context.network.nameservers != Network().nameservers:
            await serve_host_names(guest, context.network)
        if context.settings or registry_hosts(context.network) or context.network.registry_files:
            changed = await self._configure(guest, context)
        else:
            changed = False
        if changed or context.network.proxies:
            await restart_services(guest, ["containerd"])
            await wait_for_services(guest, ["containerd", "buildkit.socket"], patience=self.start_timeout)
        return []

    async def _look(self, guest: Guest) -> dict[str, str]:
        """What the guest has, one round trip: names, some with a value behind a colon; the first of a name counts."""
        done = await guest.exec(["sh", "-c", _LOOK])
        found: dict[str, str] = {}
        for line in done.stdout.decode().split():
            name, colon, value = line.partition(":")
            found.setdefault(name, value if colon else name)
        return found

    async def _write_units(self, guest: Guest, buildkitd: str) -> None:
        """Where the image brings no units for BuildKit."""
        changed = await asyncio.gather(
            guest.write_file(UNITS / "buildkit.service", buildkit_service(buildkitd)),
            guest.write_file(UNITS / "buildkit.socket", buildkit_socket()),
        )
        if any(changed):
            await reload_units(guest)

    async def start(self, guest: Guest, context: RuntimeContext) -> None:
        await start_services(guest, ["containerd", "buildkit.socket"], openrc=["containerd", "buildkitd"])

    async def ready(self, guest: Guest, context: RuntimeContext) -> bool:
        """containerd answers, and BuildKit's socket listens: systemd starts buildkitd at its first use."""
        return await wait_for_services(
            guest, ["containerd", "buildkit.socket"], openrc=["containerd", "buildkitd"],
            sockets=[str(socket.guest_path) for socket in self.sockets],
        )

    async def stop(self, guest: Guest, context: RuntimeContext) -> None:
        await guest.exec(["sh", "-c", _STOP_CONTAINERS], check=False)
        await stop_services(guest, ["buildkit.socket", "buildkit.service", "containerd"],
                            openrc=["buildkitd", "containerd"])

    async def update(self, guest: Guest, context: RuntimeContext) -> list[str]:
        """Containers run on while containerd is started anew: their shims are their parents."""
        changes = await upgrade_packages(guest, UPDATED, what="containerd")
        if changes:
            await restart_services(guest, ["containerd"])
        return changes

    def environment(self, context: RuntimeContext) -> Mapping[str, str]:
        return {
            "CONTAINERD_ADDRESS": str(context.host_socket("containerd")),
            "BUILDKIT_HOST": f"unix://{context.host_socket('buildkitd')}",
        }

    def warm_settings(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """None: `after_fork` applies them, so that all profiles share one warm image and it holds nobody's secrets."""
        return {}

    async def before_freeze(self, guest: Guest, context: RuntimeContext) -> None:
        """containerd makes its id anew when it is asked for it, and BuildKit its own at its first start."""
        await guest.exec(["sh", "-c", _FORGET_IDS])

    async def version(self, guest: Guest, context: RuntimeContext) -> str:
        return "containerd " + await find_version(guest, "containerd")

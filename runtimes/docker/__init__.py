"""Docker: dockerd in the guest, its socket and a docker context on the host."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from qvm.errors import GuestError
from qvm.runtime.base import Guest, HostSocket, Needs, Runtime, RuntimeContext
from qvm.runtime.dockercontext import activate_context, deactivate_context, testcontainers_variables
from qvm.runtime.hostnames import serve_host_names
from qvm.runtime.network import Network
from qvm.runtime.services import (
    find_version,
    install_packages,
    restart_services,
    start_services,
    stop_services,
    upgrade_packages,
    wait_for_services,
)

DAEMON_JSON = PurePosixPath("/etc/docker/daemon.json")
CONTAINERD_TOML = PurePosixPath("/etc/containerd/config.toml")
# dockerd uses no Kubernetes interface, which costs a part of containerd's start and listens on a port.
CONTAINERD_CONFIG = b'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
ENGINE_ID = "docker-engine"
ENGINE_ID_FILE = PurePosixPath("/var/lib/docker/engine-id")
# Made anew by whoever asks for it next.
CONTAINERD_ID_FILE = PurePosixPath("/var/lib/containerd/io.containerd.grpc.v1.introspection/uuid")
SERVICES = ("containerd", "docker")
UPDATED = {
    "apt": "docker.io docker-cli docker-buildx docker-compose containerd runc",
    "apk": "docker docker-cli docker-engine docker-cli-buildx docker-cli-compose containerd runc",
    "dnf": "moby-engine docker-cli docker-buildx docker-compose containerd runc",
}
PACKAGES = {"apt": "docker.io", "apk": "docker", "dnf": "moby-engine"}
# What dockerd takes up on SIGHUP (moby, daemon/reload.go); all else it reads once, at its start.
RELOADABLE = frozenset({
    "registry-mirrors", "insecure-registries", "debug", "labels", "live-restore", "max-concurrent-downloads",
    "max-concurrent-uploads", "max-download-attempts", "shutdown-timeout",
})

_LOOK = """
command -v dockerd >/dev/null && echo installed
[ -e /run/docker.pid ] && echo running
exit 0
"""
# What dockerd would say at its start, before it has to; a file that it has run with needs no second look.
_VALIDATE = """
cat >/run/qvm-daemon.json
cmp -s /run/qvm-daemon.json /etc/docker/daemon.json || dockerd --validate --config-file /run/qvm-daemon.json >/dev/null
code=$?
rm -f /run/qvm-daemon.json
exit $code
"""
# dockerd says in the journal that it has; there is no other answer to a signal.
_RELOAD = """
set -e
since=$(date +%s)
kill -HUP "$(cat /run/docker.pid)"
[ -d /run/systemd/system ] || exit 1
for turn in 1 2 3 4 5 6 7 8 9 10; do
    said=$(journalctl -q -b -u docker --since "@$since" -o cat)
    case $said in
    *'Reloaded configuration'*) exit 0 ;;
    *'validation failed'*) exit 1 ;;
    esac
    sleep 0.1
done
exit 1
"""
_JOIN_GROUP = """
if command -v usermod >/dev/null; then usermod -aG docker "$1"; else addgroup "$1" docker; fi
"""


class Docker(Runtime):
    name = "docker"
    summary = "dockerd in the VM, with a docker context on the host"
    needs = Needs(packages=PACKAGES, programs=("dockerd",))
    sockets = (HostSocket("docker", PurePosixPath("/run/docker.sock"), rehearsal=b"GET /info HTTP/1.0\r\n\r\n"),)
    # Images are in /var/lib/containerd where the profile turns the containerd image store on.
    data_folders = (PurePosixPath("/var/lib/docker"), PurePosixPath("/var/lib/containerd"))
    commands = {"docker": ("docker",)}  # noqa: RUF012  # a constant of the class, as the contract has it
    units = ("docker.service", "containerd.service")

    async def provision(self, guest: Guest, context: RuntimeContext) -> None:
        look, *_ = await asyncio.gather(
            guest.exec(["sh", "-c", _LOOK]),
            guest.write_file(CONTAINERD_TOML, CONTAINERD_CONFIG),
            serve_host_names(guest, context.network),
        )
        found = look.stdout.split()
        if b"installed" not in found:
            await install_packages(guest, PACKAGES, what="docker")
            await guest.exec(["sh", "-c", _JOIN_GROUP, "join", context.user])
        changed = await self._configure(guest, context)
        if changed and b"running" in found:
            await restart_services(guest, ["docker"])

    async def _configure(self, guest: Guest, context: RuntimeContext) -> bool:
        """Write daemon.json once dockerd has approved of it; True where it is another than before.

        GuestError with dockerd's own words where it does not.
        """
        wanted = render_daemon_json(context.settings, context.network)
        if context.settings:
            done = await guest.exec(["sh", "-c", _VALIDATE], input=wanted, check=False)
            if done.exit_code != 0:
                words = (done.stderr + done.stdout).decode(errors="replace").strip()
                raise GuestError("dockerd does not accept the settings of the profile", details=words or None,
                                 hint=f"mend `docker:` in {context.folder / 'qvm.yaml'}")
        return await guest.write_file(DAEMON_JSON, wanted)

    async def start(self, guest: Guest, context: RuntimeContext) -> None:
        await start_services(guest, SERVICES)

    async def ready(self, guest: Guest, context: RuntimeContext) -> bool:
        """dockerd notifies systemd once its API is served, so joining its start job is exact and costs no client."""
        return await wait_for_services(guest, SERVICES, sockets=["/run/docker.sock"])

    async def stop(self, guest: Guest, context: RuntimeContext) -> None:
        await stop_services(guest, ["docker.socket", "docker", "containerd"])

    def warm_settings(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """None: `after_fork` applies them, so that all profiles share one warm image and it holds nobody's secrets."""
        return {}

    async def before_freeze(self, guest: Guest, context: RuntimeContext) -> None:
        """dockerd reads its engine id once, and keeps it; BuildKit inside it goes by the same one."""
        await guest.track_id(ENGINE_ID, file=ENGINE_ID_FILE, process="dockerd")
        await guest.exec(["rm", "-f", str(CONTAINERD_ID_FILE)])

    async def after_fork(self, guest: Guest, context: RuntimeContext) -> list[str]:
        """The machine that was frozen knew no profile: its settings are applied now, by a reload where that does."""
        stale = ENGINE_ID in guest.stale_ids
        if context.network.nameservers != Network().nameservers:
            await serve_host_names(guest, context.network)
        plain = render_daemon_json(context.settings, context.network) == render_daemon_json({}, Network())
        changed = not plain and await self._configure(guest, context)
        anew = stale or context.network.proxies or (changed and not is_reloadable(context.settings))
        if changed and not anew:
            anew = (await guest.exec(["sh", "-c", _RELOAD], check=False)).exit_code != 0
        if anew:
            await restart_services(guest, ["docker"])
            await wait_for_services(guest, SERVICES, sockets=["/run/docker.sock"], patience=self.start_timeout)
        return ["docker's engine id could not be replaced in its memory: dockerd was started anew"] if stale else []

    async def version(self, guest: Guest, context: RuntimeContext) -> str:
        return "docker " + await find_version(guest, "dockerd")

    async def teardown(self, guest: Guest, context: RuntimeContext) -> None:
        await guest.exec(["rm", "-f", str(DAEMON_JSON)])

    async def update(self, guest: Guest, context: RuntimeContext) -> list[str]:
        """dockerd ends its containers when it is started anew, and brings back those whose restart policy says so."""
        changes = await upgrade_packages(guest, UPDATED, what="docker")
        if changes:
            await restart_services(guest, SERVICES)
        return changes

    def environment(self, context: RuntimeContext) -> Mapping[str, str]:
        return {
            "DOCKER_HOST": f"unix://{context.host_socket('docker')}",
            **testcontainers_variables("/var/run/docker.sock"),
        }

    def activate(self, context: RuntimeContext, *, switch: bool) -> list[str]:
        return activate_context(context, socket="docker", switch=switch)

    def deactivate(self, context: RuntimeContext, *, remove: bool) -> list[str]:
        return deactivate_context(context, remove=remove)


def render_daemon_json(settings: Mapping[str, Any], network: Network) -> bytes:
    """The profile's `docker:` section over our default; lists of registries are joined."""
    # Not `userland-proxy`, true by default: a file that says so cannot be reloaded (dockerd 26 then asks for a path).
    document: dict[str, Any] = {"host-gateway-ip": network.gateway, **settings}
    if "host-gateway-ips" in settings:
        del document["host-gateway-ip"]
    for key, ours in (("registry-mirrors", network.mirrors), ("insecure-registries", network.insecure)):
        said = settings.get(key, [])
        if ours and isinstance(said, list):
            document[key] = list(dict.fromkeys([*ours, *said]))
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def is_reloadable(settings: Mapping[str, Any]) -> bool:
    """Whether a dockerd that runs with our default can take these up without being started anew."""
    return RELOADABLE.issuperset(settings)

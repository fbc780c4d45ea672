"""Podman as root in the guest: its API, which is docker's too, on the host."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from qvm.errors import GuestError
from qvm.runtime.base import Guest, HostSocket, Needs, Runtime, RuntimeContext
from qvm.runtime.dockercontext import activate_context, deactivate_context, testcontainers_variables
from qvm.runtime.network import Network
from qvm.runtime.services import (
    INSTALL_TIMEOUT,
    find_version,
    reload_units,
    restart_services,
    start_services,
    stop_services,
    wait_for_services,
)

from .files import containers_conf, registries_conf, service_drop_in

SOCKET = PurePosixPath("/run/podman/podman.sock")
CONTAINERS_CONF = PurePosixPath("/etc/containers/containers.conf.d/10-qvm.conf")
REGISTRIES_CONF = PurePosixPath("/etc/containers/registries.conf.d/10-qvm.conf")
DROP_IN = PurePosixPath("/etc/systemd/system/podman.service.d/10-qvm.conf")
GENERATOR = PurePosixPath("/etc/systemd/system-generators/podman-system-generator")
"""Makes services of Quadlet files. Masked in qvm's image, where other runtimes would pay for it at each boot."""
SERVICES = ("podman.socket", "podman.service")
# A podman that runs has read its files; one that does not will.
_RESTART = "[ ! -d /run/systemd/system ] || exec systemctl try-restart podman.service"


class Podman(Runtime):
    name = "podman"
    summary = "podman in the VM, for `podman --remote` and docker clients on the host"
    # catatonit is what `--init` runs; without netavark and aardvark-dns containers have no network and no names.
    needs = Needs(
        packages={
            "apt": "podman netavark aardvark-dns catatonit",
            "apk": "podman netavark aardvark-dns catatonit",
            "dnf": "podman netavark aardvark-dns catatonit",
        },
        programs=("podman",),
    )
    sockets = (HostSocket("podman", SOCKET, rehearsal=b"GET /info HTTP/1.0\r\n\r\n"),)
    data_folders = (PurePosixPath("/var/lib/containers"),)
    commands = {"podman": ("sudo", "podman")}  # noqa: RUF012  # a constant of the class, as the contract has it
    credential_variables = {"podman": "REGISTRY_AUTH_FILE={folder}/config.json"}  # noqa: RUF012  likewise
    units = ("podman.service", "podman-restart.service")
    start_timeout = INSTALL_TIMEOUT
    """The first start in an image without podman fetches and unpacks it."""

    async def provision(self, guest: Guest, context: RuntimeContext) -> None:
        await super().provision(guest, context)
        changed, unit_changed = await asyncio.gather(
            self._configure(guest, context), guest.write_file(DROP_IN, service_drop_in())
        )
        if unit_changed:
            await guest.exec(["rm", "-f", str(GENERATOR)])
            await reload_units(guest)
        if changed or unit_changed:
            await guest.exec(["sh", "-c", _RESTART])

    async def _configure(self, guest: Guest, context: RuntimeContext) -> bool:
        try:
            conf = containers_conf(context.settings, context.network)
        except ValueError as error:
            raise GuestError(f"the settings of the profile for podman cannot be used: {error}",
                             hint=f"mend `podman:` in {context.folder / 'qvm.yaml'}") from error
        changed = await asyncio.gather(
            guest.write_file(CONTAINERS_CONF, conf),
            guest.write_file(REGISTRIES_CONF, registries_conf(context.network)),
        )
        return any(changed)

    async def start(self, guest: Guest, context: RuntimeContext) -> None:
        """Containers with a restart policy come back by a unit of podman's own."""
        await start_services(guest, [*SERVICES, "podman-restart.service"], openrc=["podman"])

    async def ready(self, guest: Guest, context: RuntimeContext) -> bool:
        return await wait_for_services(guest, SERVICES, openrc=["podman"], sockets=[str(SOCKET)])

    async def stop(self, guest: Guest, context: RuntimeContext) -> None:
        await guest.exec(["podman", "stop", "--all", "--time", "5"], check=False)
        await stop_services(guest, ["podman.socket", "podman.service"], openrc=["podman"])

    def warm_settings(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """None: `after_fork` applies them, so that all profiles share one warm image and it holds nobody's secrets."""
        return {}

    async def after_fork(self, guest: Guest, context: RuntimeContext) -> list[str]:
        """Podman has no identity of its own. What it was started with, it has read: settings mean a new start."""
        if context.settings or context.network != Network(registry_files=context.network.registry_files):
            await self._configure(guest, context)
            await restart_services(guest, ["podman.service"])
            await wait_for_services(guest, SERVICES, sockets=[str(SOCKET)], patience=self.start_timeout)
        return []

    async def version(self, guest: Guest, context: RuntimeContext) -> str:
        return "podman " + await find_version(guest, "podman")

    async def update(self, guest: Guest, context: RuntimeContext) -> list[str]:
        """Containers run on: podman is no parent of theirs."""
        changes = await super().update(guest, context)
        if changes:
            await restart_services(guest, ["podman.service"])
        return changes

    def environment(self, context: RuntimeContext) -> Mapping[str, str]:
        address = f"unix://{context.host_socket('podman')}"
        return {
            "CONTAINER_HOST": address,
            "DOCKER_HOST": address,
            **testcontainers_variables(str(SOCKET)),
        }

    def activate(self, context: RuntimeContext, *, switch: bool) -> list[str]:
        return activate_context(context, socket="podman", switch=switch)

    def deactivate(self, context: RuntimeContext, *, remove: bool) -> list[str]:
        return deactivate_context(context, remove=remove)

"""A runtime that serves a folder of the data disk over HTTP, at a port of the host and at a socket.

The worked example of docs/runtime-plugins.md. It needs nothing but busybox, which the image has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from qvm.runtime.base import Guest, HostPort, HostSocket, Needs, ReadyCheck, Runtime, RuntimeContext
from qvm.runtime.services import reload_units, restart_services, start_services, stop_services, wait_for_services

PAGES = PurePosixPath("/srv/httpd")
UNIT = PurePosixPath("/etc/systemd/system/httpd.service")
SOCKET_UNIT = PurePosixPath("/etc/systemd/system/httpd.socket")
SOCKET = PurePosixPath("/run/httpd.sock")
PORT = 8099


class Httpd(Runtime):
    name = "httpd"
    summary = "busybox's web server"
    needs = Needs(packages={"apt": "busybox-static", "apk": "busybox-extras"}, programs=("busybox",))
    sockets = (HostSocket("httpd", SOCKET),)
    data_folders = (PAGES,)
    commands = {"pages": ("ls", str(PAGES))}  # noqa: RUF012  # a constant of the class, as the contract has it
    units = ("httpd.service",)
    start_timeout = 60.0

    async def provision(self, guest: Guest, context: RuntimeContext) -> None:
        await super().provision(guest, context)
        await guest.write_file(PAGES / "hello", f"hello from {context.profile}\n".encode())
        changed = await guest.write_file(UNIT, _unit())
        changed |= await guest.write_file(SOCKET_UNIT, _socket_unit())
        changed |= await guest.write_file(UNIT.with_name("httpd@.service"), _one_request())
        if changed:
            await reload_units(guest)
            await restart_services(guest, ["httpd"])

    async def start(self, guest: Guest, context: RuntimeContext) -> None:
        await start_services(guest, ["httpd", "httpd.socket"])

    def checks(self, context: RuntimeContext) -> Sequence[ReadyCheck]:
        return (
            ReadyCheck("the web server", self._serves, "`qvm logs runtime` shows its journal", 60.0),
            ReadyCheck("its first page", self._has_a_page, f"{PAGES} in the guest must hold `hello`", 10.0),
        )

    async def _serves(self, guest: Guest, context: RuntimeContext) -> bool:
        return await wait_for_services(guest, ["httpd", "httpd.socket"], sockets=[str(SOCKET)])

    async def _has_a_page(self, guest: Guest, context: RuntimeContext) -> bool:
        argv = ["busybox", "wget", "-q", "-O", "-", f"http://127.0.0.1:{PORT}/hello"]
        return (await guest.exec(argv, check=False)).stdout.startswith(b"hello")

    async def stop(self, guest: Guest, context: RuntimeContext) -> None:
        await stop_services(guest, ["httpd.socket", "httpd"])

    async def version(self, guest: Guest, context: RuntimeContext) -> str:
        first = (await guest.exec(["busybox"])).stdout.decode().splitlines()[0]
        return "httpd " + first.split()[1].removeprefix("v")

    async def after_fork(self, guest: Guest, context: RuntimeContext) -> list[str]:
        await guest.write_file(PAGES / "hello", f"hello from {context.profile}\n".encode())
        return [f"{self.name} greets as {context.profile} from now on"]

    def host_ports(self, context: RuntimeContext) -> Sequence[HostPort]:
        return (HostPort("http", PORT),)

    def activate(self, context: RuntimeContext, *, switch: bool) -> list[str]:
        (context.folder / "httpd.url").write_text(f"http://127.0.0.1:{context.host_ports['http']}/\n")
        return []

    def deactivate(self, context: RuntimeContext, *, remove: bool) -> list[str]:
        (context.folder / "httpd.url").unlink(missing_ok=True)
        return []


def _unit() -> bytes:
    return f"[Service]\nExecStart=/usr/bin/busybox httpd -f -p 127.0.0.1:{PORT} -h {PAGES}\n".encode()


def _socket_unit() -> bytes:
    return f"[Socket]\nListenStream={SOCKET}\nAccept=yes\n".encode()


def _one_request() -> bytes:
    return f"[Service]\nStandardInput=socket\nExecStart=/usr/bin/busybox httpd -i -h {PAGES}\n".encode()

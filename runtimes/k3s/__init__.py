"""Kubernetes: k3s on top of docker or containerd, its API server and its services on the host."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qvm.errors import GuestCommandError, GuestError, ImageError
from qvm.runtime.base import Guest, HostPort, Needs, Progress, ReadyCheck, Runtime, RuntimeContext
from qvm.runtime.checking import wait_for_checks
from qvm.runtime.services import restart_services, start_services, stop_services, wait_for_services

from . import guest as inside
from . import kubeconfig, kubefiles, release, services

PORT = "kubernetes"
OWN_FILE = "kubeconfig.yaml"
_K3S_YAML = "k3s.yaml"
_STATE = "kubeconfig.json"
IMPORT_TIMEOUT = 1200.0
_HINT = "`qvm logs runtime` shows k3s's journal"


def _supplied() -> release.Artifacts:
    return release.supplied(Path(os.environ["QVM_K3S"]).expanduser())


class K3s(Runtime):
    name = "k3s"
    summary = "Kubernetes on top of docker or containerd (`qvm start --kubernetes`)"
    runs_on = ("containerd", "docker")
    needs = Needs(
        packages={"apt": "containernetworking-plugins iptables curl", "apk": "cni-plugins iptables curl",
                  "dnf": "containernetworking-plugins iptables-nft curl"},
        programs=("iptables", "curl"), kernel_modules=("br_netfilter", "overlay"),
    )
    private_ports = inside.PORTS
    data_folders = inside.DATA
    commands = {  # noqa: RUF012  # a constant of the class, as the contract has it
        "k3s": ("sudo", "k3s"), "kubectl": ("sudo", "k3s", "kubectl"), "crictl": ("sudo", "k3s", "crictl"),
    }
    units = ("k3s.service",)
    start_timeout = 420.0
    single_use = True

    def primary_settings(self, primary: str) -> Mapping[str, Any]:
        return inside.containerd_settings() if primary == "containerd" else {}

    def prepare_host(self, context: RuntimeContext, progress: Progress) -> None:
        self._artifacts(context, progress)

    def _artifacts(self, context: RuntimeContext, progress: Progress | None = None) -> release.Artifacts:
        """Binary and images on the host; without `progress` nothing is fetched any more."""
        if os.environ.get("QVM_K3S"):
            return _supplied()
        assert context.cache_folder is not None, "given by the core"
        wish = str(context.settings.get("version", ""))
        if progress is None:
            version = release.resolve_known(wish, context.cache_folder)
            found = release.find(version, context.arch, context.cache_folder)
            if found is None:
                raise ImageError(f"k3s {version} is not in the cache any more", hint="`qvm start` fetches it again")
            return found
        version = release.resolve(wish, context.cache_folder, progress)
        return release.obtain(version, context.arch, context.cache_folder, progress)

    async def provision(self, guest: Guest, context: RuntimeContext) -> None:
        """The runtime under it answers by now, so images can be imported."""
        await super().provision(guest, context)
        artifacts = await asyncio.to_thread(self._artifacts, context)
        look = (await guest.exec(["sh", "-c", inside.LOOK])).stdout.decode()
        words = [line.split() for line in look.splitlines() if line.strip()]
        plugins = next((line[1] for line in words if line[0] == "cni"), None)
        if plugins is None:
            raise GuestError("the guest has no CNI plugins", hint="use qvm's own image (--image debian-13)")
        changed = artifacts.digest not in words[0]
        if changed:
            await guest.send_file(artifacts.binary, inside.BINARY, mode=0o755)
        args = inside.server_args(context.primary, list(context.settings.get("args", ())))
        written = await guest.write_file(inside.UNIT, inside.unit(args, primary=context.primary))
        network = inside.CNI_CONF[context.primary] / "10-k3s.conflist"
        written |= await guest.write_file(network, inside.network())
        if changed or written:
            await guest.exec(["sh", "-c", inside.PREPARE, "prepare", plugins])
        if changed:
            version = (await guest.exec([str(inside.BINARY), "--version"])).stdout.decode().split()
            await guest.write_file(inside.STAMP, f"{artifacts.digest} {version[2]}\n".encode())
        known = {line[1] for line in words if line[0] == "image"}
        await self._import_images(guest, context, artifacts, known)
        if (changed or written) and ["running"] in words:
            await restart_services(guest, ["k3s"])

    async def _import_images(
        self, guest: Guest, context: RuntimeContext, artifacts: release.Artifacts, known: set[str]
    ) -> None:
        for path in artifacts.images:
            stamp = f"{artifacts.digest[:12]}-{path.name}"
            if stamp in known:
                continue
            there = inside.IMAGES.parent / f".{path.name}"
            await guest.send_file(path, there)
            script = inside.IMPORTED.format(inside.IMPORT[context.primary])
            try:
                await guest.exec(["sh", "-c", script, "import", str(there), stamp], timeout=IMPORT_TIMEOUT)
            except GuestCommandError as error:
                raise GuestError(f"the images of {path.name} could not be imported into {context.primary}",
                                 details=error.details) from error

    async def start(self, guest: Guest, context: RuntimeContext) -> None:
        await start_services(guest, ["k3s"])

    def checks(self, context: RuntimeContext) -> Sequence[ReadyCheck]:
        return (
            ReadyCheck("k3s's API server", self._serves, _HINT, self.start_timeout),
            ReadyCheck("the Kubernetes node", self._node_ready, _HINT, self.start_timeout),
        )

    async def _serves(self, guest: Guest, context: RuntimeContext) -> bool:
        return await wait_for_services(guest, ["k3s"])

    async def _node_ready(self, guest: Guest, context: RuntimeContext) -> bool:
        for script in (inside.NODE_READY, inside.ACCOUNT_READY):
            if (await guest.exec(["sh", "-c", script], check=False)).exit_code != 0:
                return False
        await self._fetch_kubeconfig(guest, context)
        return True

    async def _fetch_kubeconfig(self, guest: Guest, context: RuntimeContext) -> None:
        text = (await guest.exec(["cat", str(inside.KUBECONFIG)])).stdout
        context.state_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = context.state_folder / _K3S_YAML
        path.touch(mode=0o600)
        path.write_bytes(text)

    async def stop(self, guest: Guest, context: RuntimeContext) -> None:
        """k3s and every pod's containers."""
        await stop_services(guest, ["k3s"])
        script = inside.KILL_PODS[context.primary] + inside.UNMOUNT
        await guest.exec(["sh", "-c", script], timeout=120.0, check=False)

    async def reset(self, guest: Guest, context: RuntimeContext) -> None:
        """To an empty cluster: what it holds goes, images stay."""
        await self.stop(guest, context)
        await guest.exec(["sh", "-c", inside.WIPE], timeout=120.0)

    async def teardown(self, guest: Guest, context: RuntimeContext) -> None:
        await self.reset(guest, context)
        await guest.exec(["rm", "-f", str(inside.UNIT), str(inside.STAMP), str(inside.BINARY)])
        await guest.exec(["systemctl", "daemon-reload"])

    async def version(self, guest: Guest, context: RuntimeContext) -> str:
        words = (await guest.exec(["cat", str(inside.STAMP)], check=False)).stdout.decode().split()
        return f"k3s {words[-1]}" if words else "k3s"

    def warm_settings(self, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """The host's port is the host's business; a channel counts as what it was found to stand for."""
        version = release.meaning_of(str(settings.get("version", "")))
        mark = f"{_supplied().digest}" if os.environ.get("QVM_K3S") else ""
        return {"version": version, "args": list(settings.get("args", ())), **({"digest": mark} if mark else {})}

    async def after_fork(self, guest: Guest, context: RuntimeContext) -> list[str]:
        """Keys must be of one cluster alone: where others go on from the same state, they are made anew."""
        if not context.sole:
            await self.stop(guest, context)
            await guest.exec(["sh", "-c", inside.FORGET_KEYS])
            await start_services(guest, ["k3s"])
            await wait_for_checks(self, guest, context)
            return ["k3s has made keys of its own for this copy, and started anew"]
        await self._fetch_kubeconfig(guest, context)
        return []

    def host_ports(self, context: RuntimeContext) -> Sequence[HostPort]:
        return (HostPort(PORT, inside.API_PORT, int(context.settings.get("listen_port") or 0)),)

    async def watch_ports(
        self, guest: Guest, context: RuntimeContext, publish: Callable[[Sequence[tuple[str, int]]], None]
    ) -> None:
        port = context.host_ports[PORT]
        await services.watch_services(port, self._access(context), inside.NODE, publish)

    def _access(self, context: RuntimeContext) -> kubeconfig.Access:
        text = (context.state_folder / _K3S_YAML).read_text()
        return kubeconfig.parse_k3s(text, port=context.host_ports[PORT])

    def activate(self, context: RuntimeContext, *, switch: bool) -> list[str]:
        name = kubeconfig.context_name(context.profile)
        home = str(context.folder.parent)
        own = context.folder / OWN_FILE
        try:
            access = self._access(context)
            own.touch(mode=0o600)
            own.write_text(kubeconfig.render(name, access, home=home))
        except (OSError, ValueError) as error:
            return [f"k3s's kubeconfig cannot be used: {error}"]
        files = kubefiles.find_files(context.env)
        try:
            kubefiles.publish(files, kubeconfig.build_entries(name, access, home=home), context.state_folder / _STATE,
                              home=home, switch=switch)
        except kubefiles.ForeignEntryError as error:
            return [f"your kubeconfig has {error} that is not qvm's, which was left alone; use KUBECONFIG={own}"]
        except kubefiles.CannotEditError as error:
            return [f"your kubeconfig ({', '.join(map(str, files))}) {error} and was left alone; use KUBECONFIG={own}"]
        except OSError as error:
            return [f"your kubeconfig could not be changed ({error}); use KUBECONFIG={own}"]
        return []

    def deactivate(self, context: RuntimeContext, *, remove: bool) -> list[str]:
        name = kubeconfig.context_name(context.profile)
        try:
            kubefiles.withdraw(name, context.state_folder / _STATE, home=str(context.folder.parent), drop=remove)
            if remove:
                (context.folder / OWN_FILE).unlink(missing_ok=True)
        except (OSError, kubefiles.CannotEditError) as error:
            return [f"your kubeconfig could not be changed back: {error}"]
        return []

"""Several runtimes in one machine, as one: the primary, and add-ons on top of it.

The supervisor and the makers of warm images know one `Runtime`; a `Stack` is that where there are add-ons too. Starts
go from the bottom to the top, stops the other way round.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qvm.config.model import Config
from qvm.config.plugins import list_runtime_names
from qvm.errors import UsageError
from qvm.runtime.base import Guest, HostPort, Progress, ReadyCheck, Runtime, RuntimeContext
from qvm.runtime.checking import wait_for_checks
from qvm.runtime.registry import load_runtime


def load_stack(config: Config) -> Stack:
    """The runtimes of a profile. UsageError where an add-on cannot be on top of the primary one, or none is known."""
    primary = load_runtime(config.runtime)
    if primary.runs_on:
        raise UsageError(
            f"{primary.name} runs on top of {' or '.join(primary.runs_on)} and not alone",
            hint=f"qvm start --runtime {primary.runs_on[0]} --kubernetes",
        )
    addons = [load_runtime(name) for name in config.addons()]
    for addon in addons:
        if primary.name not in addon.runs_on:
            raise UsageError(f"{addon.name} needs a runtime under it: {' or '.join(addon.runs_on)}; "
                             f"this profile has {primary.name}",
                             hint=f"qvm start --runtime {addon.runs_on[0]} (a new profile)")
    return Stack(primary, addons)


def sections_of(config: Config) -> dict[str, Mapping[str, Any]]:
    """Settings of each of a profile's runtimes, by its name: its section of the profile file."""
    section = getattr(config, config.runtime, None)
    return {**config.addons(), **({config.runtime: section} if isinstance(section, Mapping) else {})}


class Stack(Runtime):
    """Asks each runtime in turn, with the context that is its own."""

    def __init__(self, primary: Runtime, addons: Sequence[Runtime] = ()) -> None:
        self.layers = (primary, *addons)
        self.name = "+".join(layer.name for layer in self.layers)
        self.summary = primary.summary
        self.sockets = tuple(socket for layer in self.layers for socket in layer.sockets)
        self.private_ports = tuple(port for layer in self.layers for port in layer.private_ports)
        self.data_folders = tuple(dict.fromkeys(folder for layer in self.layers for folder in layer.data_folders))
        self.commands = {word: prefix for layer in self.layers for word, prefix in layer.commands.items()}
        self.credential_variables = {
            word: variable for layer in self.layers for word, variable in layer.credential_variables.items()
        }
        self.units = tuple(dict.fromkeys(unit for layer in self.layers for unit in layer.units))
        self.start_timeout = sum(layer.start_timeout for layer in self.layers)
        self.single_use = any(layer.single_use for layer in self.layers)

    def parts(self, context: RuntimeContext) -> list[tuple[Runtime, RuntimeContext]]:
        """Each runtime with its context, from the bottom to the top."""
        primary, *addons = self.layers
        settings: Mapping[str, Any] = context.sections.get(primary.name, {})
        for addon in addons:
            settings = merge_settings(addon.primary_settings(primary.name), settings)
        below = replace(context.own(primary.name), settings=settings)
        return [(primary, below), *((addon, context.own(addon.name, addon_to=primary.name)) for addon in addons)]

    def without(self, name: str) -> Stack:
        primary, *addons = self.layers
        return Stack(primary, [addon for addon in addons if addon.name != name])

    def find(self, name: str) -> Runtime | None:
        return next((layer for layer in self.layers if layer.name == name), None)

    def prepare_host(self, context: RuntimeContext, progress: Progress) -> None:
        for layer, own in self.parts(context):
            layer.prepare_host(own, progress)

    async def provision(self, guest: Guest, context: RuntimeContext) -> None:
        primary, own = self.parts(context)[0]
        await primary.provision(guest, own)

    async def start(self, guest: Guest, context: RuntimeContext) -> None:
        """An add-on is provisioned, and then started, when what is under it answers."""
        (primary, below), *addons = self.parts(context)
        await primary.start(guest, below)
        for addon, own in addons:
            await wait_for_checks(primary, guest, below)
            await addon.provision(guest, own)
            await addon.start(guest, own)

    def checks(self, context: RuntimeContext) -> Sequence[ReadyCheck]:
        return tuple(_in_context(check, own) for layer, own in self.parts(context) for check in layer.checks(own))

    async def stop(self, guest: Guest, context: RuntimeContext) -> None:
        for layer, own in reversed(self.parts(context)):
            await layer.stop(guest, own)

    async def version(self, guest: Guest, context: RuntimeContext) -> str:
        return ", ".join([await layer.version(guest, own) for layer, own in self.parts(context)])

    async def update(self, guest: Guest, context: RuntimeContext) -> list[str]:
        return [line for layer, own in self.parts(context) for line in await layer.update(guest, own)]

    def environment(self, context: RuntimeContext) -> Mapping[str, str]:
        return {name: value for layer, own in self.parts(context) for name, value in layer.environment(own).items()}

    def host_ports(self, context: RuntimeContext) -> Sequence[HostPort]:
        return tuple(port for layer, own in self.parts(context) for port in layer.host_ports(own))

    async def watch_ports(
        self, guest: Guest, context: RuntimeContext, publish: Callable[[Sequence[tuple[str, int]]], None]
    ) -> None:
        known: dict[str, Sequence[tuple[str, int]]] = {}

        async def watch(layer: Runtime, own: RuntimeContext) -> None:
            def tell(ports: Sequence[tuple[str, int]]) -> None:
                known[layer.name] = ports
                publish([port for ports in known.values() for port in ports])

            await layer.watch_ports(guest, own, tell)

        async with asyncio.TaskGroup() as group:
            for layer, own in self.parts(context):
                group.create_task(watch(layer, own), name=f"ports of {layer.name}")

    def warm_identity(self, sections: Mapping[str, Mapping[str, Any]]) -> list[Any]:
        whole = [layer.warm_identity(sections) for layer in self.layers]
        return whole[0] if len(whole) == 1 else whole

    async def before_freeze(self, guest: Guest, context: RuntimeContext) -> None:
        for layer, own in self.parts(context):
            await layer.before_freeze(guest, own)

    async def after_fork(self, guest: Guest, context: RuntimeContext) -> list[str]:
        return [note for layer, own in self.parts(context) for note in await layer.after_fork(guest, own) or ()]

    async def teardown(self, guest: Guest, context: RuntimeContext) -> None:
        for layer, own in reversed(self.parts(context)):
            await layer.teardown(guest, own)

    def activate(self, context: RuntimeContext, *, switch: bool) -> list[str]:
        return [note for layer, own in self.parts(context) for note in layer.activate(own, switch=switch) or ()]

    def deactivate(self, context: RuntimeContext, *, remove: bool) -> list[str]:
        return [note for layer, own in reversed(self.parts(context))
                for note in layer.deactivate(own, remove=remove) or ()]


def withdraw_absent(stack: Stack, context: RuntimeContext) -> list[str]:
    """Take back what add-ons have published that this profile had once and has no more; returns notes."""
    folders = context.state_folder.iterdir() if context.state_folder.is_dir() else ()
    notes: list[str] = []
    for name in sorted(folder.name for folder in folders if folder.is_dir()):
        if stack.find(name) is None and name in list_runtime_names():
            own = context.own(name, addon_to=stack.layers[0].name)
            notes += load_runtime(name).deactivate(own, remove=True) or ()
    return notes


def merge_settings(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, mappings key by key."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = (merge_settings(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping)
                       else value)
    return merged


def _in_context(check: ReadyCheck, own: RuntimeContext) -> ReadyCheck:
    async def ask(guest: Guest, _: RuntimeContext) -> bool:
        return await check.check(guest, own)

    return ReadyCheck(check.name, ask, check.hint, check.timeout)

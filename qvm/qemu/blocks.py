"""The disks of a running machine: a new layer on top, a layer in between taken out. See `qvm.image.layers`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvm.errors import QemuError
from qvm.qemu.features import QemuFeatures
from qvm.qemu.monitor import Event, Monitor

CANCEL_TIMEOUT = 30.0
"""Seconds until a job that was told to end has ended: it finishes the piece it is at."""


@dataclass(frozen=True, slots=True)
class NewLayer:
    disk: str
    """The disk's id: "root", "data"."""
    path: Path
    """An empty overlay on what the machine writes to now."""


async def active_node(monitor: Monitor, disk: str) -> dict[str, Any]:
    """QAPI's BlockDeviceInfo of what a disk writes to."""
    for entry in await monitor.execute("query-block"):
        if f"/drive-{disk}/" in f"{entry.get('qdev', '')}/" and "inserted" in entry:
            return dict(entry["inserted"])
    raise QemuError(f"the machine has no disk {disk!r}")


async def active_file(monitor: Monitor, disk: str) -> Path:
    """The file a disk writes to, as it was opened; the format node above it may go by a description instead."""
    below = (await _children(monitor, (await active_node(monitor, disk))["node-name"]))["file"]
    nodes = await monitor.execute("query-named-block-nodes", {"flat": True})
    return Path(next(entry["file"] for entry in nodes if entry["node-name"] == below))


async def put_on_top(monitor: Monitor, layers: Sequence[NewLayer], features: QemuFeatures) -> None:
    """Have the machine, which is paused, write to new layers from now on: to all of them, or to none (QemuError).

    What is below is closed for writing, so that others can open it.
    """
    below: dict[str, dict[str, Any]] = {}
    added: list[str] = []
    try:
        for layer in layers:
            below[layer.disk] = await active_node(monitor, layer.disk)
            await monitor.blockdev_add(_options(layer, features))
            added.append(_node(layer))
        await monitor.execute("transaction", {"actions": [
            {"type": "blockdev-snapshot", "data": {"node": below[layer.disk]["node-name"], "overlay": _node(layer)}}
            for layer in layers
        ]})  # fmt: skip
    except QemuError:
        for node in added:
            await monitor.blockdev_del(node)
        raise
    for layer in layers:
        await _close_for_writing(monitor, below[layer.disk]["node-name"])


def _node(layer: NewLayer) -> str:
    # No two layers of one machine have the same number, and the nodes of its command line are called otherwise.
    return f"layer-{layer.path.stem}"[:31]


def _options(layer: NewLayer, features: QemuFeatures) -> dict[str, Any]:
    """As on the command line (devices.py)."""
    return {
        "driver": "qcow2", "node-name": _node(layer), "backing": None, "discard": "unmap", "detect-zeroes": "unmap",
        "file": {"driver": "file", "filename": str(layer.path), "discard": "unmap",
                 "aio": "io_uring" if features.io_uring else "threads"},
    }  # fmt: skip


async def _close_for_writing(monitor: Monitor, node: str) -> None:
    children = await _children(monitor, node)
    await monitor.execute("blockdev-reopen", {"options": [{
        "driver": "qcow2", "node-name": node, "read-only": True, "file": children["file"],
        "backing": children.get("backing"),
    }]})  # fmt: skip


async def _children(monitor: Monitor, node: str) -> dict[str, str]:
    """Role ("file", "backing") to node. Names of files would not do: a layer may have been renamed since."""
    graph = await monitor.execute("x-debug-query-block-graph")
    names = {entry["id"]: entry["name"] for entry in graph["nodes"]}
    number = next(key for key, name in names.items() if name == node)
    return {edge["name"]: names[edge["child"]] for edge in graph["edges"] if edge["parent"] == number}


async def merge_into_top(
    monitor: Monitor, disk: str, *, base: str | None, timeout: float, stop: asyncio.Event | None = None
) -> bool:
    """Have the layer that a disk writes to take over what it lacks of the layer below it, while the machine runs.

    From then on it stands on what that one stood on: `base`, as the header is to name it; None: nothing.
    False where it was given up because `stop` was set, QemuError where QEMU refuses or it takes longer than `timeout`
    seconds: then all is as before.
    """
    top = (await active_node(monitor, disk))["node-name"]
    lower = (await _children(monitor, top)).get("backing")
    if lower is None:
        raise QemuError(f"the disk {disk} has one layer only")
    arguments: dict[str, Any] = {"job-id": f"merge-{disk}", "device": top, "auto-dismiss": True}
    if base is not None:
        arguments |= {"base-node": (await _children(monitor, lower))["backing"], "backing-file": base}
    outcome: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()

    def see(event: Event) -> None:
        data = event.get("data", {})
        ended = event.get("event") in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
        if ended and data.get("device") == arguments["job-id"] and not outcome.done():
            outcome.set_result({**data, "event": event["event"]})

    with monitor.subscribed(see):
        await monitor.execute("block-stream", arguments)
        stopped = asyncio.ensure_future((stop or asyncio.Event()).wait())
        try:
            await asyncio.wait((outcome, stopped), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if not outcome.done():
                await _cancel_job(monitor, arguments["job-id"], outcome)
            result = outcome.result()
        finally:
            stopped.cancel()
    if result["event"] == "BLOCK_JOB_CANCELLED" and stop is not None and stop.is_set():
        return False
    if result["event"] != "BLOCK_JOB_COMPLETED" or result.get("error"):
        raise QemuError(f"the disk {disk} could not be merged: {result.get('error', 'it took too long')}")
    return True


async def _cancel_job(monitor: Monitor, job: str, outcome: asyncio.Future[Mapping[str, Any]]) -> None:
    """Returns once the job has ended, one way or the other."""
    try:
        await monitor.execute("block-job-cancel", {"device": job})
    except QemuError:
        if not outcome.done():  # it was about to end by itself; else this is another trouble
            raise
    await asyncio.wait((outcome,), timeout=CANCEL_TIMEOUT)
    if not outcome.done():
        raise QemuError(f"QEMU did not end {job} within {CANCEL_TIMEOUT:g} s")


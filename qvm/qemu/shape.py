"""What a running machine consists of now, asked of QEMU itself: nobody has to have remembered it."""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from pathlib import Path

from qvm.arch import find_arch
from qvm.errors import QemuError
from qvm.qemu.monitor import Monitor

_HVA = re.compile(r"\bis (0x[0-9a-f]+)")
_MOUNT = re.compile(r"mount[0-9]+")


@dataclass(frozen=True, slots=True)
class Block:
    """One piece of RAM."""

    id: str
    """Of the DIMM; "" for what the machine was started with."""
    size: int
    """Bytes."""
    guest_address: int
    file: Path | None
    """What it began with, mapped privately; None: it began empty."""


@dataclass(frozen=True, slots=True)
class RunningShape:
    cpus: int
    mounts: int
    """9p devices."""
    blocks: tuple[Block, ...]
    """What the machine was started with first."""


async def read_shape(monitor: Monitor, arch: str) -> RunningShape:
    cpus = len(await monitor.execute("query-cpus-fast"))
    summary = await monitor.execute("query-memory-size-summary")
    peripherals = await monitor.execute("qom-list", {"path": "/machine/peripheral"})
    known = find_arch(arch)
    start = known.ram_start if known else 0
    blocks = [Block("", int(summary["base-memory"]), start, await _file_of(monitor, "/objects/ram"))]
    devices = await monitor.execute("query-memory-devices")
    for dimm in sorted((entry["data"] for entry in devices), key=lambda data: int(data["addr"])):
        blocks.append(Block(str(dimm["id"]), int(dimm["size"]), int(dimm["addr"]),
                            await _file_of(monitor, str(dimm["memdev"]))))  # fmt: skip
    return RunningShape(cpus, sum(_MOUNT.fullmatch(entry["name"]) is not None for entry in peripherals), tuple(blocks))


async def _file_of(monitor: Monitor, backend: str) -> Path | None:
    kind = await monitor.execute("qom-get", {"path": backend, "property": "type"})
    if kind != "memory-backend-file":
        return None
    return Path(await monitor.execute("qom-get", {"path": backend, "property": "mem-path"}))


async def host_address(monitor: Monitor, block: Block) -> int:
    """Where a piece of RAM is in QEMU's own address space."""
    answer = await monitor.human(f"gpa2hva {block.guest_address:#x}")
    found = _HVA.search(answer)
    if found is None:
        raise QemuError(f"QEMU does not tell where its guest's RAM is: {answer.strip()}")
    return int(found[1], 16)


def open_file_of(pid: int, path: Path) -> Path:
    """A way to read the file QEMU has open at `path`, which may be deleted by now (QEMU keeps RAM files open)."""
    wanted = (os.fspath(path), f"{path} (deleted)")
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(entry) in wanted:  # noqa: PTH115  (a deleted file's name is no path)
                return entry
        except FileNotFoundError:  # closed since it was listed
            continue
    raise QemuError(f"QEMU does not have {path} open")


async def save_stream(monitor: Monitor, path: Path, *, timeout: float) -> None:
    """Everything of a paused machine, RAM included, by QEMU's own migration: works everywhere and takes seconds."""
    path.touch(mode=0o600)
    await monitor.execute("migrate-set-parameters", {"max-bandwidth": 1 << 60})
    await monitor.give_file(path, "stream", writable=True)
    await monitor.execute("migrate", {"uri": "fd:stream"})
    async with asyncio.timeout(timeout):
        while True:
            answer = await monitor.execute("query-migrate")
            if answer.get("status") == "completed":
                return
            if answer.get("status") in ("failed", "cancelled"):
                raise QemuError(f"QEMU could not save the machine: {answer.get('error-desc', 'it did not say why')}")
            await asyncio.sleep(0.02)

"""Layers on top of a real QEMU's disks, its RAM and devices saved and gone on from. The guest is a loop."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from test_qemu_real import Bench, bench, make_disk  # noqa: F401

from qvm.filenames import Files
from qvm.image import layers, merge
from qvm.image.layers import LayeredDisk
from qvm.instance.spec import Dimm, Disk
from qvm.process import Identity
from qvm.qemu import blocks
from qvm.qemu.blocks import NewLayer
from qvm.qemu.machine import stop_qemu
from qvm.qemu.monitor import Monitor
from qvm.qemu.ram import copy_sparse, find_mapping, save_changed
from qvm.qemu.ramchanges import link_open_file, load_changes, save_changes
from qvm.qemu.shape import host_address, open_file_of, read_shape, save_stream
from qvm.qemu.state import restore_devices, save_devices
from qvm.supervisor.freezing import take_up
from qvm.units import MiB

DISKS = ("root", "data")


def disk_of(bench: Bench, name: str) -> LayeredDisk:  # noqa: F811
    path = next(disk.path for disk in bench.spec.disks if disk.id == name)
    return LayeredDisk(path, bench.folder / f"{name} layers", name)


async def snapshot(bench: Bench, monitor: Monitor) -> dict[str, str]:  # noqa: F811
    disks = {name: disk_of(bench, name) for name in DISKS}
    tops = {name: layers.frozen_name(disk) for name, disk in disks.items()}
    new = {name: layers.add_layer(disk, tops[name]) for name, disk in disks.items()}
    await monitor.pause()
    await blocks.put_on_top(monitor, [NewLayer(name, path) for name, path in new.items()], bench.features)
    for name, path in new.items():
        layers.switch(disks[name], path)
    await monitor.resume()
    return {name: path.name for name, path in tops.items()}


async def write(monitor: Monitor, name: str, offset: int, pattern: int) -> None:
    """As the guest would, through its device."""
    device = f"/machine/peripheral/drive-{name}/virtio-backend"
    answer = await monitor.human(f'qemu-io -d {device} "write -P {pattern} {offset} 64k"')
    assert not answer.strip(), answer


def reads(path: Path, offset: int, pattern: int) -> bool:
    done = subprocess.run(["qemu-io", "-r", "-U", "-f", "qcow2", "-c", f"read -P {pattern} {offset} 64k",
                           path.resolve()], capture_output=True, check=False)  # fmt: skip
    assert b"read 65536/65536" in done.stdout, done
    return b"verification failed" not in done.stdout


def test_layers_on_top_of_a_running_machine(bench: Bench) -> None:  # noqa: F811
    async def story() -> None:
        monitor = await Monitor.connect(bench.spec.monitor_socket)
        for number in range(3):
            for name in DISKS:
                await write(monitor, name, number << 16, 10 + number)
                await write(monitor, name, 7 << 16, 20 + number)
            if number < 2:
                tops.append(await snapshot(bench, monitor))
        await monitor.pause()  # and so have everything written
        await monitor.close()

    tops: list[dict[str, str]] = []
    bench.start()
    asyncio.run(story())
    for name in DISKS:
        disk = disk_of(bench, name)
        assert layers.newest(disk).name == f"{name}-2.qcow2"
        assert [top[name] for top in tops] == [f"{name}-0.qcow2", f"{name}-1.qcow2"]
        assert reads(disk.folder / tops[0][name], 7 << 16, 20) and reads(disk.folder / tops[1][name], 7 << 16, 21)
        assert reads(disk.path, 7 << 16, 22) and reads(disk.path, 0, 10)
        # Nobody holds what is below for writing: another machine can open it, and write to a layer of its own.
        other = LayeredDisk(bench.folder / "other" / "root.qcow2", bench.folder / "other" / name, name)
        layers.link_chain(disk.folder / tops[1][name], other)
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 99 0 64k", layers.newest(other)], check=True,
                       stdout=subprocess.DEVNULL)
        assert reads(disk.path, 0, 10)


def test_a_layer_is_taken_out_while_the_machine_runs(bench: Bench) -> None:  # noqa: F811
    async def story() -> None:
        monitor = await Monitor.connect(bench.spec.monitor_socket)
        await write(monitor, "data", 0, 1)
        await snapshot(bench, monitor)
        await write(monitor, "data", 1 << 16, 2)
        await snapshot(bench, monitor)
        await write(monitor, "data", 2 << 16, 3)
        disk = disk_of(bench, "data")
        for below in (1, 0):
            work = merge.plan_merge(disk, [], running=True)
            assert work is not None and work.lower.name == f"data-{below}.qcow2"
            base = layers.read_header(work.lower).backing
            assert await blocks.merge_into_top(monitor, "data", base=base, timeout=20)
            work.lower.unlink()
        assert merge.plan_merge(disk, [], running=True) is None
        await write(monitor, "data", 3 << 16, 4)
        # And the next snapshot works.
        await snapshot(bench, monitor)
        await stop_qemu(identity, monitor, force=True)
        await monitor.close()

    identity = bench.start()
    asyncio.run(story())
    disk = disk_of(bench, "data")
    assert [path.name for path in layers.layers_in(disk)] == ["data-2.qcow2", "data-3.qcow2"]
    assert all(reads(disk.path, number << 16, 1 + number) for number in range(4))
    assert layers.read_header(disk.folder / "data-2.qcow2").backing is None


@contextmanager
def slowly(monitor: Monitor) -> Iterator[None]:
    """Merges take 1 MiB a second, so that there is time to interrupt them."""
    execute = monitor.execute

    async def slow(command: str, arguments: Any = None, **options: Any) -> Any:
        return await execute(command, {**arguments, "speed": 1 << 20} if command == "block-stream" else arguments,
                             **options)

    with patch.object(monitor, "execute", slow):
        yield


def test_a_merge_lets_go_when_it_is_told_to(bench: Bench) -> None:  # noqa: F811
    """Somebody wants to save the machine: the disk is as before, and merged another time."""
    async def story() -> None:
        monitor = await Monitor.connect(bench.spec.monitor_socket)
        await write(monitor, "data", 0, 1)
        await snapshot(bench, monitor)
        device = "/machine/peripheral/drive-data/virtio-backend"
        assert not (await monitor.human(f'qemu-io -d {device} "write -P 7 1M 32M"')).strip()
        await snapshot(bench, monitor)
        await write(monitor, "data", 2 << 16, 3)
        disk, stop = disk_of(bench, "data"), asyncio.Event()
        stop.set()
        work = merge.plan_merge(disk, [], running=True)
        assert work is not None
        base = layers.read_header(work.lower).backing
        with slowly(monitor):
            assert not await blocks.merge_into_top(monitor, "data", base=base, timeout=20, stop=stop)
        assert merge.plan_merge(disk, [], running=True) == work
        assert layers.chain_of(layers.newest(disk))[1] == work.lower
        await snapshot(bench, monitor)
        work = merge.plan_merge(disk, [], running=True)
        assert work is not None
        assert await blocks.merge_into_top(monitor, "data", base=layers.read_header(work.lower).backing, timeout=20,
                                           stop=asyncio.Event())  # fmt: skip
        work.lower.unlink()
        await stop_qemu(identity, monitor, force=True)
        await monitor.close()

    identity = bench.start()
    asyncio.run(story())
    disk = disk_of(bench, "data")
    for offset, pattern in ((0, 1), (2 << 16, 3), (1 << 20, 7), (32 << 20, 7)):
        assert reads(disk.path, offset, pattern)


def test_the_pair_of_disks_is_frozen_together_or_not_at_all(bench: Bench) -> None:  # noqa: F811
    async def story() -> None:
        monitor = await Monitor.connect(bench.spec.monitor_socket)
        disk = disk_of(bench, "root")
        new = layers.add_layer(disk, layers.frozen_name(disk))
        await monitor.pause()
        with pytest.raises(Exception, match="gone"):
            await blocks.put_on_top(
                monitor, [NewLayer("root", new), NewLayer("data", bench.folder / "gone-1.qcow2")], bench.features
            )
        await write(monitor, "root", 0, 9)
        await monitor.resume()
        await stop_qemu(identity, monitor, force=True)
        await monitor.close()

    identity = bench.start()
    asyncio.run(story())
    disk = disk_of(bench, "root")
    assert not disk.path.is_symlink() and reads(disk.path, 0, 9)
    layers.remove_unused(disk, [])
    assert not disk.folder.exists()


def test_a_machine_whose_saving_was_interrupted_is_taken_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    """It stands still, and writes to layers that nobody has recorded."""
    monkeypatch.setenv("QVM_HOME", str(bench.folder / "q"))
    files = Files("dev")
    for path in (files.root_disk, files.data_disk):
        path.parent.mkdir(parents=True, exist_ok=True)
        make_disk(path)
    bench.spec = replace(bench.spec, disks=(Disk(files.root_disk, "root"), Disk(files.data_disk, "data")))
    disks = {"root": layers.root_disk(files), "data": layers.data_disk(files)}

    async def story() -> None:
        monitor = await Monitor.connect(bench.spec.monitor_socket)
        new = {name: layers.add_layer(disk, layers.frozen_name(disk)) for name, disk in disks.items()}
        await monitor.pause()
        await blocks.put_on_top(monitor, [NewLayer(name, path) for name, path in new.items()], bench.features)
        assert not files.root_disk.is_symlink()
        await take_up(monitor, files)
        assert await monitor.status() == "running"
        assert {name: layers.newest(disk) for name, disk in disks.items()} == new
        await take_up(monitor, files)
        await stop_qemu(identity, monitor, force=True)
        await monitor.close()

    identity = bench.start()
    asyncio.run(story())


MARKS = {5 * MiB: b"in the file", 100 * MiB: b"written since", 200 * MiB: b"at the end"}


def poke(identity: Identity, address: int, data: bytes) -> None:
    fd = os.open(f"/proc/{identity.pid}/mem", os.O_RDWR)
    os.pwrite(fd, data, address)
    os.close(fd)


def peek(identity: Identity, address: int, size: int) -> bytes:
    fd = os.open(f"/proc/{identity.pid}/mem", os.O_RDONLY)
    try:
        return os.pread(fd, size, address)
    finally:
        os.close(fd)


async def check_marks(bench: Bench, identity: Identity, monitor: Monitor, *offsets: int) -> None:  # noqa: F811
    block = (await read_shape(monitor, bench.spec.arch)).blocks[0]
    start = await host_address(monitor, block)
    for offset in offsets:
        assert peek(identity, start + offset, len(MARKS[offset])) == MARKS[offset]


def base_file(bench: Bench) -> Path:  # noqa: F811
    path = bench.folder / "base ram"
    with path.open("wb") as file:
        file.truncate(256 * MiB)
        file.seek(5 * MiB)
        file.write(MARKS[5 * MiB])
    return path


@pytest.mark.parametrize("linked", [False, True], ids=["copied", "linked"])
def test_ram_and_devices_are_saved_twice_and_gone_on_from(bench: Bench, linked: bool) -> None:  # noqa: F811
    """From a file, on to a second machine, on to a third: each time from what the one before had become."""
    bench.spec = replace(bench.spec, ram_file=base_file(bench), mount_slots=12, idle_folder=bench.folder)

    async def save(identity: Identity, name: str) -> None:
        monitor = await Monitor.connect(bench.spec.monitor_socket)
        shape = await read_shape(monitor, bench.spec.arch)
        assert (shape.cpus, shape.mounts, len(shape.blocks)) == (2, 12, 1)
        block = shape.blocks[0]
        assert block.file == bench.spec.ram_file and block.size == 256 * MiB
        start = await host_address(monitor, block)
        mapping = find_mapping(identity.pid, block.file)
        assert mapping is not None and mapping.start == start
        if linked:
            assert link_open_file(open_file_of(identity.pid, block.file), bench.folder / name)
        else:
            copy_sparse(open_file_of(identity.pid, block.file), bench.folder / name)
        await monitor.pause()
        if linked:
            save_changes(identity.pid, start, block.size, bench.folder / f"{name} changes")
        else:
            save_changed(identity.pid, start, block.size, bench.folder / name)
        await save_devices(monitor, bench.folder / f"{name} devices")
        await stop_qemu(identity, monitor, force=True)
        await monitor.close()

    async def go_on(name: str) -> Identity:
        bench.spec = replace(bench.spec, ram_file=bench.folder / name, incoming=True)
        identity = await asyncio.to_thread(bench.start)
        monitor = await Monitor.connect(bench.spec.monitor_socket)
        if linked:
            (block,) = (await read_shape(monitor, bench.spec.arch)).blocks
            start = await host_address(monitor, block)
            load_changes(identity.pid, start, block.size, bench.folder / f"{name} changes")
        await restore_devices(monitor, bench.folder / f"{name} devices", bench.features)
        (bench.folder / name).unlink()  # mapped, so it lasts as long as the machine
        await monitor.resume()
        assert await monitor.status() == "running"
        await monitor.close()
        return identity

    async def story() -> None:
        identity = await asyncio.to_thread(bench.start)
        for offset, name in ((100 * MiB, "one"), (200 * MiB, "two")):
            monitor = await Monitor.connect(bench.spec.monitor_socket)
            start = await host_address(monitor, (await read_shape(monitor, bench.spec.arch)).blocks[0])
            await monitor.close()
            poke(identity, start + offset, MARKS[offset])
            await save(identity, name)
            identity = await go_on(name)
        monitor = await Monitor.connect(bench.spec.monitor_socket)
        await check_marks(bench, identity, monitor, *MARKS)
        await stop_qemu(identity, monitor, force=True)
        await monitor.close()

    asyncio.run(story())


def test_memory_that_was_plugged_in(bench: Bench) -> None:  # noqa: F811
    if bench.spec.arch != "x86_64":
        pytest.skip("memory is plugged in through ACPI")

    async def story() -> None:
        identity = await asyncio.to_thread(bench.start)
        monitor = await Monitor.connect(bench.spec.monitor_socket)
        await monitor.object_add("memory-backend-ram", "mem-dimm0", size=128 * MiB)
        await monitor.device_add("pc-dimm", "dimm0", memdev="mem-dimm0")
        base, dimm = (await read_shape(monitor, "x86_64")).blocks
        assert (base.id, base.file, dimm.id, dimm.size) == ("", None, "dimm0", 128 * MiB)
        await monitor.pause()
        for block, name in ((base, "ram"), (dimm, "dimm")):
            start = await host_address(monitor, block)
            poke(identity, start + 5 * MiB, name.encode())
            save_changed(identity.pid, start, block.size, bench.folder / name)
        assert (bench.folder / "dimm").stat().st_blocks * 512 < MiB
        await save_devices(monitor, bench.folder / "devices")
        await stop_qemu(identity, monitor, force=True)
        await monitor.close()
        bench.spec = replace(bench.spec, ram_file=bench.folder / "ram", incoming=True,
                             dimms=(Dimm("dimm0", 128 * MiB, bench.folder / "dimm"),))  # fmt: skip
        identity = await asyncio.to_thread(bench.start)
        monitor = await Monitor.connect(bench.spec.monitor_socket)
        await restore_devices(monitor, bench.folder / "devices", bench.features)
        for block, name in zip((await read_shape(monitor, "x86_64")).blocks, ("ram", "dimm"), strict=True):
            assert peek(identity, await host_address(monitor, block) + 5 * MiB, len(name)) == name.encode()
        await stop_qemu(identity, monitor, force=True)
        await monitor.close()

    asyncio.run(story())


def test_everything_in_one_stream(bench: Bench) -> None:  # noqa: F811
    async def story() -> None:
        identity = await asyncio.to_thread(bench.start)
        monitor = await Monitor.connect(bench.spec.monitor_socket)
        start = await host_address(monitor, (await read_shape(monitor, bench.spec.arch)).blocks[0])
        for offset, data in MARKS.items():
            poke(identity, start + offset, data)
        await monitor.pause()
        await save_stream(monitor, bench.folder / "stream", timeout=30)
        await monitor.resume()  # a snapshot runs on after it
        assert await monitor.status() == "running"
        await stop_qemu(identity, monitor, force=True)
        await monitor.close()
        bench.spec = replace(bench.spec, incoming=True)
        identity = await asyncio.to_thread(bench.start)
        monitor = await Monitor.connect(bench.spec.monitor_socket)
        await restore_devices(monitor, bench.folder / "stream", bench.features)
        await check_marks(bench, identity, monitor, *MARKS)
        await stop_qemu(identity, monitor, force=True)
        await monitor.close()

    asyncio.run(story())

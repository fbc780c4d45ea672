"""Phases of a boot by the console's words."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from qvm.errors import NotReadyError
from qvm.guest import bootwatch
from qvm.guest.bootwatch import PANIC_REQUIREMENT, PanicWatch, Phases, watch_boot

KERNEL = b"[    0.000000] Linux version 6.12.0 (gcc) #1 SMP\r\n"
SYSTEMD = b"[    9.120000] systemd[1]: systemd 257 running in system mode\r\n"
LOCAL = b"[   20.1] cloud-init[432]: Cloud-init v. 25.1.4 running 'init-local' at Mon, 23 Nov 2026. Up 20 seconds.\r\n"
NETWORK = b"[   30.1] cloud-init[480]: Cloud-init v. 25.1.4 running 'init' at Mon, 23 Nov 2026. Up 30 seconds.\r\n"


def test_in_order() -> None:
    phases = Phases()
    assert [phases.feed(part) for part in (b"BdsDxe: starting", KERNEL, SYSTEMD, LOCAL, NETWORK, NETWORK)] == [
        [], ["firmware"], ["kernel"], ["services"], ["cloud-init"], []]


def test_a_word_that_comes_in_two_pieces() -> None:
    phases = Phases()
    assert phases.feed(KERNEL[:20]) == []
    assert phases.feed(KERNEL[20:]) == ["firmware"]


def test_a_quiet_console_tells_what_it_tells() -> None:
    phases = Phases()
    assert phases.feed(LOCAL) == ["firmware", "kernel", "services"]
    assert phases.feed(KERNEL) == []


def test_a_panic_is_heard() -> None:
    phases = Phases()
    assert phases.panic is None
    phases.feed(KERNEL + b"[   16.2] Kernel panic - not syncing: Fatal exception\r\n[   19.5] Shutting down")
    assert phases.panic == "Kernel panic - not syncing: Fatal exception"


def test_a_machine_that_panics_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootwatch, "LOOK", 0.01)
    log = tmp_path / "serial.log"

    async def follow() -> None:
        ended = asyncio.Event()

        async def end() -> None:
            ended.set()

        with PanicWatch(log, None, end):
            log.write_bytes(KERNEL + b"Kernel panic - not syncing: VFS\n")
            async with asyncio.timeout(5):
                await ended.wait()
            raise NotReadyError("qemu", "QEMU ended")

    with pytest.raises(NotReadyError, match=r"kernel gave up \(Kernel panic - not syncing: VFS\)") as raised:
        asyncio.run(follow())
    assert raised.value.requirement == PANIC_REQUIREMENT


def test_only_what_comes_from_now_on_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootwatch, "LOOK", 0.01)
    log = tmp_path / "serial.log"
    log.write_bytes(KERNEL + SYSTEMD)
    told: list[str] = []

    async def follow() -> None:
        task = asyncio.create_task(watch_boot(log, lambda name, state, seconds: told.append(f"{name} {state}"),
                                              start=log.stat().st_size))
        await asyncio.sleep(0.1)
        assert told == []
        with log.open("ab") as file:
            file.write(KERNEL)
        async with asyncio.timeout(5):
            while not told:
                await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(follow())
    assert told == ["firmware done"]

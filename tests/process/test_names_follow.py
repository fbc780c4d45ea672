"""Names in a guest follow the host and other instances: real files and processes, and a guest that writes down."""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from qvm.config.resolve import resolve_config
from qvm.execresult import ExecResult
from qvm.filenames import Files
from qvm.instance.record import GuestUser, Record, Run
from qvm.instance.store import save_record, save_run
from qvm.process import identify
from qvm.supervisor import names
from qvm.supervisor.hostnetwork import read_network
from qvm.supervisor.hostresolver import read_resolver
from qvm.supervisor.names import NameService


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **options: Any) -> None:
        asyncio.run(test(*args, **options))

    return run


@dataclass
class Guest:
    files: dict[str, bytes] = field(default_factory=dict)
    hosts: str = ""
    commands: list[list[str]] = field(default_factory=list)

    async def exec(self, argv: Sequence[str], *, input: bytes | None = None, env: Mapping[str, str] | None = None,
                   timeout: float = 60.0, check: bool = True) -> ExecResult:
        self.commands.append(list(argv))
        if argv[3] == "hosts":
            self.hosts = argv[4]
        return ExecResult(0, b"", b"")

    async def write_file(self, path: PurePosixPath, data: bytes, *, mode: int = 0o644) -> bool:
        changed = self.files.get(str(path)) != data
        self.files[str(path)] = data
        return changed


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QVM_HOME", str(tmp_path / "q"))
    monkeypatch.setattr(names, "INTERVAL", 0.02)
    monkeypatch.setattr("sys.platform", "linux")
    return tmp_path


def make(profile: str, *, number: int = 0, **flags: Any) -> Record:
    config = resolve_config(profile, {"mounts": "none", "network_address": bool(number), **flags}, cwd=Path("/"),
                            profile_file=False).config
    record = Record("u", config, "image", "52:54:00:00:00:01", GuestUser("me", 1, 1, "/h"), 1, "tcg", 0.0,
                    network_number=number)
    save_record(record)
    return record


def service(record: Record, resolver: Path) -> NameService:
    return NameService(record, read_network(record.config, {}), resolver=lambda: read_resolver(resolver))


async def until(probe: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not probe():
            await asyncio.sleep(0.01)


@in_loop
async def test_an_ordinary_fork_hears_nothing_at_its_start(home: Path) -> None:
    (home / "resolv.conf").write_text("nameserver 1.1.1.1\n")
    guest = Guest()
    await service(make("dev"), home / "resolv.conf").settle(guest, fresh=True)  # type: ignore[arg-type]
    assert not guest.commands and not guest.files


@in_loop
async def test_a_machine_of_unknown_state_hears_everything_once(home: Path) -> None:
    (home / "resolv.conf").write_text("nameserver 1.1.1.1\n")
    guest, following = Guest(), service(make("dev", dns_hosts=["db.test=host.qvm.internal"]), home / "resolv.conf")
    await following.settle(guest, fresh=False)  # type: ignore[arg-type]
    following.begin(guest)  # type: ignore[arg-type]
    await until(lambda: guest.hosts)
    assert guest.files["/etc/resolv.conf"] == b"nameserver 10.0.2.3\n" and guest.files["/etc/qvm/names"] == b""
    assert "10.0.2.2 db.test\n" in guest.hosts and "10.0.2.15 dev.qvm.internal\n" in guest.hosts
    count = len(guest.commands)
    await asyncio.sleep(0.2)
    following.end()
    assert len(guest.commands) == count, "nothing changes, nothing is said"


@in_loop
async def test_a_vpn_comes_and_goes(home: Path) -> None:
    file, guest = home / "resolv.conf", Guest()
    file.write_text("nameserver 1.1.1.1\nsearch office.example\n")
    following = service(make("dev"), file)
    await following.settle(guest, fresh=True)  # type: ignore[arg-type]
    assert guest.files["/etc/resolv.conf"] == b"search office.example\nnameserver 10.0.2.3\n", "before it is ready"
    following.begin(guest)  # type: ignore[arg-type]
    file.write_text("nameserver fd00::1\nsearch vpn.example office.example\n")
    await until(lambda: guest.files["/etc/resolv.conf"] == b"search vpn.example office.example\nnameserver fec0::3\n")
    file.unlink()
    await until(lambda: guest.files["/etc/resolv.conf"] == b"nameserver 10.0.2.3\n")
    assert following.status()["search"] == []
    following.end()


@in_loop
async def test_other_instances_are_known_while_they_run(home: Path) -> None:
    guest = Guest()
    following = service(make("dev", number=2), home / "none")
    make("plain"), make("near", number=3), make("off", number=4)
    this = Run(identify(os.getpid(), ""), 1, "tcg", 0.0)
    for profile in ("plain", "near"):
        save_run(profile, this)
    save_run("off", replace(this, qemu=replace(this.qemu, started=this.qemu.started - 1000)))
    await following.settle(guest, fresh=True)  # type: ignore[arg-type]
    assert guest.hosts.splitlines()[:3] == [
        "10.71.86.3 near.qvm.internal", "10.0.2.2 plain.qvm.internal", "10.71.86.2 dev.qvm.internal"]
    assert "off.qvm.internal" not in guest.hosts, "a stale file is no machine"
    following.begin(guest)  # type: ignore[arg-type]
    Files("near").run.unlink()
    await until(lambda: "near" not in guest.hosts)
    save_run("off", this)
    await until(lambda: "10.71.86.4 off.qvm.internal" in guest.hosts)
    following.end()


@in_loop
async def test_without_an_address_of_its_own_a_machine_reaches_others_by_the_host(home: Path) -> None:
    guest, following = Guest(), service(make("dev"), home / "none")
    make("near", number=3)
    save_run("near", Run(identify(os.getpid(), ""), 1, "tcg", 0.0))
    await following.settle(guest, fresh=True)  # type: ignore[arg-type]
    assert not guest.commands, "no start waits for that"
    following.begin(guest)  # type: ignore[arg-type]
    await until(lambda: "10.0.2.2 near.qvm.internal" in guest.hosts)
    following.end()

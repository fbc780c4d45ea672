"""`qvm run` before any machine: its words, its signals, its plans."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import click
import pytest

from qvm.cli.run import _command, _duration
from qvm.commands import run as run_module
from qvm.commands import run_plan
from qvm.commands.run import Interrupts, Timeout
from qvm.commands.run_plan import Wish
from qvm.errors import UsageError
from qvm.guest.terminal import STUCK_AFTER, StuckKeys
from qvm.progress import NullProgress
from qvm.supervisor.runplan import RunPlan, seed_data

CONTEXT = click.Context(click.Command("run"))
PARAMETER = click.Option(["--timeout"])


@pytest.mark.parametrize(
    ("text", "seconds"), [("1", 1), ("1.5", 1.5), (".5", 0.5), ("90s", 90), ("2m", 120), ("1h", 3600), ("1d", 86400)]
)
def test_times_as_timeout_has_them(text: str, seconds: float) -> None:
    assert _duration(CONTEXT, PARAMETER, text) == seconds


@pytest.mark.parametrize("text", ["", "0", "soon", "1w", "-1", "1 2"])
def test_no_times(text: str) -> None:
    with pytest.raises(click.BadParameter):
        _duration(CONTEXT, PARAMETER, text)


def test_no_command_needs_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _command(("a", "-b")) == ["a", "-b"]
    read, write = os.pipe()
    with os.fdopen(read) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        with pytest.raises(UsageError):
            _command(())
    os.close(write)


def test_first_interrupt_is_the_commands() -> None:
    interrupts = Interrupts()
    assert interrupts.decide(signal.SIGINT) == ("forward", signal.SIGINT)
    assert interrupts.decide(signal.SIGINT) == ("end", 130)
    assert Interrupts().decide(signal.SIGQUIT) == ("forward", signal.SIGQUIT)
    assert Interrupts().decide(signal.SIGTERM) == ("end", 143)
    assert Interrupts().decide(signal.SIGHUP) == ("end", 129)


def test_exit_code_of_a_time_that_is_up() -> None:
    timeout = Timeout(1)
    assert timeout.exit_code(3) == 3
    timeout.passed = True
    assert timeout.exit_code(143) == 124
    timeout.killed = True
    assert timeout.exit_code(137) == 137


def test_interrupt_keys_on_a_guest_that_hangs() -> None:
    stuck: list[int] = []
    keys = StuckKeys(lambda: stuck.append(1))
    for second in range(20):  # a live guest takes what it is given
        keys.see(b"\x03\x03\x03", untaken=0, now=float(second))
    for second in (20.0, 20.5, 21.0):
        keys.see(b"\x03", untaken=3, now=second)
    assert stuck == []
    for _ in range(3):
        keys.see(b"\x03", untaken=9, now=19.0 + STUCK_AFTER + 1)
    assert stuck == [1]
    keys.see(b"\x03", untaken=0, now=30.0)
    keys.see(b"\x03\x03\x03", untaken=3, now=30.1)
    assert stuck == [1]


def plan(**changes: Any) -> RunPlan:
    values: dict[str, Any] = {
        "argv": ("qemu", "-m", "1"), "features": {}, "warm": "/w", "root": "/r", "root_format": "qcow2",
        "root_size": 1, "data": "/d", "data_size": 2, "cpus": 2, "memory": 3, "plug": 0, "runtime": "none",
        "user": {"name": "joe", "uid": 1000, "gid": 1000, "home": "/home/joe.guest"}, "hostname": "qvm-run",
        "mounts": ({"source": "/src", "target": "/src", "writable": True},), "dns": (), "data_folders": (),
        "cwd": "/src",
    }  # fmt: skip
    return RunPlan(**(values | changes))


def test_plans_survive_json() -> None:
    assert RunPlan.from_dict(json.loads(json.dumps(plan().to_dict()))) == plan()
    with pytest.raises(TypeError):
        RunPlan.from_dict({"argv": []})


def test_every_machine_is_told_another_identity() -> None:
    first, second = seed_data(plan(), {"A": "1"}), seed_data(plan(), {})
    assert first.machine_id != second.machine_id and first.instance_id != second.instance_id
    assert first.env == {"A": "1"} and first.user == "joe"
    assert str(first.mounts[0].target) == "/src"


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Wish]:
    """Counts how often a plan is made; makes the same one each time, which watches one file."""
    monkeypatch.setenv("QVM_HOME", str(tmp_path / "q"))
    monkeypatch.setenv("QVM_CACHE_HOME", str(tmp_path / "c"))
    made: list[Wish] = []
    mounts = ({"source": str(tmp_path), "target": "/src", "writable": True},)

    class Maker:
        def __init__(self, wish: Wish, progress: object) -> None:
            made.append(wish)

        def make(self) -> tuple[RunPlan, dict[str, str], list[Path]]:
            return plan(mounts=mounts), {"A": "slow"}, [tmp_path / "watched", tmp_path / "not there"]

    (tmp_path / "watched").write_text("1")
    monkeypatch.setattr(run_plan, "_Maker", Maker)
    return made


def ask(**changes: Any) -> dict[str, str]:
    values: dict[str, Any] = {"flags": {"env": ["A=b"]}, "cwd": Path("/")}
    return run_plan.plan_run(Wish(**(values | changes)), progress=NullProgress())[1]


def test_a_plan_is_made_once(maker: list[Wish]) -> None:
    assert ask() == {"A": "slow"}
    assert ask() == {"A": "b"} and len(maker) == 1
    assert ask(flags={"env": {"A": "c"}}) == {"A": "c"} and len(maker) == 1, "values of the environment decide nothing"
    ask(flags={"cpus": "4"})
    ask(cwd=Path("/tmp"))
    ask(guest_cwd="/x")
    assert len(maker) == 4
    ask(cold=True)
    ask(flags={"env": ["not a variable"]})
    assert len(maker) == 6
    run_plan.forget_plan(Wish({}, Path("/")))
    ask(flags={})
    assert len(maker) == 7


def test_a_plan_is_made_anew_when_something_changed(
    maker: list[Wish], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask()
    (tmp_path / "watched").write_text("other")
    ask()
    assert len(maker) == 2
    (tmp_path / "not there").touch()
    ask()
    assert len(maker) == 3
    monkeypatch.setenv("QVM_QEMU", "/elsewhere")
    ask()
    assert len(maker) == 4
    ask()
    assert len(maker) == 4
    for entry in (tmp_path / "c" / "probe").glob("run-*.json"):
        entry.write_text(entry.read_text()[:-20])
    ask()
    assert len(maker) == 5, "a damaged file counts as none"


def test_secrets_are_not_kept(maker: list[Wish], tmp_path: Path) -> None:
    ask(flags={"env": ["TOKEN=hunter2"]})
    assert all("hunter2" not in path.read_text() for path in (tmp_path / "c" / "probe").iterdir())


def test_an_interrupt_ends_the_loop_although_a_task_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "CANCEL_PATIENCE", 0.05)
    held = 0

    async def deaf() -> None:
        nonlocal held
        while held < 100:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                held += 1

    async def work() -> None:
        task = asyncio.ensure_future(deaf())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
        await task

    with pytest.raises(KeyboardInterrupt):
        run_module._run_loop(work)
    assert held > 0

"""suspend, resume, snapshot, clone: what is typed, what is called, what is said."""

from __future__ import annotations

import json

import pytest
from test_cli_contract import Capture, Fakes, Result, fakes  # noqa: F401

from qvm.cli.main import run
from qvm.commands.results import CloneResult, SnapshotResult, SuspendResult


@pytest.mark.parametrize("argv", [["suspend", "dev"], ["stop", "dev", "--suspend"], ["-p", "dev", "suspend"]])
def test_suspend_under_each_of_its_names(fakes: Fakes, capsys: Capture, argv: list[str]) -> None:  # noqa: F811
    fakes.set("suspend", "suspend", SuspendResult("dev", True, 0.5, timings={"ram": 0.1}))
    assert run(argv) == 0
    assert fakes.calls == [("suspend", ("dev",), {})]
    assert "dev suspended after 500 ms; `qvm resume dev` goes on" in capsys.readouterr().out
    fakes.set("suspend", "suspend", SuspendResult("dev", False, 0.0))
    assert run(argv) == 0 and "already" in capsys.readouterr().out


def test_to_suspend_by_force_makes_no_sense(fakes: Fakes, capsys: Capture) -> None:  # noqa: F811
    assert run(["stop", "dev", "--suspend", "-f"]) == 2
    assert "exclude each other" in capsys.readouterr().err and fakes.calls == []


def test_resume(fakes: Fakes) -> None:  # noqa: F811
    fakes.set("suspend", "resume", Result(status={"state": "running"}))
    assert run(["resume", "dev"]) == 0
    assert fakes.calls == [("resume", ("dev",), {})]


@pytest.mark.parametrize("verb", ["create", "restore", "delete"])
def test_a_snapshots_name_comes_last(fakes: Fakes, verb: str) -> None:  # noqa: F811
    fakes.set("snapshot", verb, SnapshotResult("dev", "before", verb, 0.4, True, 0.05))
    assert run(["snapshot", verb, "dev", "before"]) == 0
    assert run(["snapshot", verb, "before"]) == 0
    assert run(["snapshot", verb, "-p", "dev", "before"]) == 0
    assert [args for _, args, _ in fakes.calls] == [("dev", "before"), ("default", "before"), ("dev", "before")]
    assert run(["snapshot", verb]) == 2
    assert run(["snapshot", verb, "dev", "before", "what"]) == 2
    assert len(fakes.calls) == 3


def test_what_a_snapshot_took(fakes: Fakes, capsys: Capture) -> None:  # noqa: F811
    fakes.set("snapshot", "create", SnapshotResult("dev", "s", "create", 0.4, True, 0.0512))
    assert run(["snapshot", "create", "dev", "s"]) == 0
    assert "snapshot s of dev made in 400 ms, standing still for 51 ms" in capsys.readouterr().out
    fakes.set("snapshot", "restore", SnapshotResult("dev", "s", "restore", 0.4, False))
    assert run(["snapshot", "restore", "dev", "s"]) == 0
    assert "dev is off, its disks as in snapshot s" in capsys.readouterr().out


def test_the_list_of_snapshots(fakes: Fakes, capsys: Capture) -> None:  # noqa: F811
    rows = [{"name": "s", "created": 0.0, "running": True, "size": 2 << 20}]
    fakes.set("snapshot", "list_all", rows)
    assert run(["snapshot", "ls", "dev"]) == 0
    out = capsys.readouterr().out
    assert "disks and memory" in out and "2 MiB" in out
    assert run(["snapshot", "list", "dev", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"] == rows
    fakes.set("snapshot", "list_all", [])
    assert run(["snapshot", "list", "dev"]) == 0 and "no snapshots" in capsys.readouterr().out


def test_clone(fakes: Fakes, capsys: Capture) -> None:  # noqa: F811
    fakes.set("clone", "clone", CloneResult("new", "dev", True, 0.3))
    assert run(["clone", "dev", "new"]) == 0
    assert fakes.calls == [("clone", ("dev", "new"), {})]
    assert "`qvm start new` goes on where dev was" in capsys.readouterr().out
    assert run(["clone", "dev"]) == 2
    assert run(["snapshot", "crate", "dev", "s"]) == 2 and "create" in capsys.readouterr().err

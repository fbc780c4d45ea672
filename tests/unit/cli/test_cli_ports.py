"""`qvm ports`: what its words mean, and what it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qvm.api import VM
from qvm.cli.main import run
from qvm.cli.ports import render_ports
from qvm.commands.ports import PortsResult, add_rules, ports, remove_rules
from qvm.config.model import Config
from qvm.config.ports import parse_rule
from qvm.errors import ConfigError, UsageError
from qvm.filenames import Files
from qvm.instance.record import GuestUser, Record
from qvm.instance.store import load_record, save_record
from qvm.units import GiB


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """An instance `dev` that does not run, with a profile file."""
    monkeypatch.setenv("QVM_HOME", str(tmp_path))
    save_record(Record(
        uuid="8d0e3c50-54c5-4c5f-9d5c-5a3c7b1c2f10",
        config=Config(profile="dev", cpus=1, memory=GiB, disk=GiB, root_disk=GiB, arch="x86_64", runtime="none",
                      accel="tcg", image="debian-13", hostname="dev", port_forwards=(parse_rule("8080:80"),)),
        image_id="0" * 64, mac="52:54:00:00:00:01", user=GuestUser("ana", 1000, 1000, "/home/ana.guest"),
        ssh_port=2222, accel="tcg", created=0.0,
    ))  # fmt: skip
    files = Files("dev")
    files.config.parent.mkdir()
    files.config.write_text("cpus: 1  # few\nportForwards:\n- 8080:80\n")
    return files


def rules(profile: str = "dev") -> list[str]:
    return [str(rule) for rule in load_record(profile).config.port_forwards]


def test_new_rules_go_first_and_are_kept_in_record_and_file(dev: Files, tmp_path: Path) -> None:
    result = add_rules("dev", ["9090:90", "ignore:53/udp"], cwd=tmp_path)
    assert result.rules == rules() == ["9090:90", "ignore:53/udp", "8080:80"]
    assert dev.config.read_text() == "cpus: 1  # few\nportForwards:\n- 9090:90\n- ignore:53/udp\n- 8080:80\n"
    remove_rules("dev", ["9090:90", "8080:80"], cwd=tmp_path)
    assert rules() == ["ignore:53/udp"]
    assert {entry["reason"] for entry in result.forwards} == {"dev does not run"}


def test_a_rule_that_is_there_moves_to_the_front(dev: Files, tmp_path: Path) -> None:
    add_rules("dev", ["9090:90"], cwd=tmp_path)
    assert add_rules("dev", ["8080:80"], cwd=tmp_path).rules == ["8080:80", "9090:90"]


def test_without_saving_the_profile_stays_as_it_was(dev: Files, tmp_path: Path) -> None:
    before = dev.config.read_text()
    add_rules("dev", ["9090:90"], save=False, cwd=tmp_path)
    assert dev.config.read_text() == before and rules() == ["9090:90", "8080:80"]


def test_what_is_wrong_changes_nothing(dev: Files, tmp_path: Path) -> None:
    before = dev.config.read_text()
    with pytest.raises(ConfigError, match="same end on the host"):
        add_rules("dev", ["8080:81"], cwd=tmp_path)
    with pytest.raises(ConfigError, match="neither a port"):
        add_rules("dev", ["80:http"], cwd=tmp_path)
    with pytest.raises(UsageError, match="there is no rule 9090:90") as caught:
        remove_rules("dev", ["9090:90"], cwd=tmp_path)
    assert caught.value.hint == "there are: 8080:80"
    assert rules() == ["8080:80"] and dev.config.read_text() == before


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["ports", "dev"], ["8080:80"]),
        (["ports", "add", "1:2", "3:4", "-p", "dev"], ["1:2", "3:4", "8080:80"]),
        (["ports", "dev", "add", "1:2"], ["1:2", "8080:80"]),
        (["-p", "dev", "ports", "rm", "8080:80"], []),
        (["ports", "dev", "remove", "8080:80", "--no-save-config"], []),
    ],
)
def test_words(dev: Files, argv: list[str], wanted: list[str]) -> None:
    assert run(argv) == 0
    assert rules() == wanted


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["ports", "add", "-p", "dev"], 2, "a rule is missing"),
        (["ports", "dev", "8080:80"], 2, "`qvm ports add 8080:80 -p dev` adds a rule"),
        (["ports", "dev", "add", "8080:99999"], 2, "out of range"),
        (["ports", "nobody"], 3, "there is no instance 'nobody'"),
    ],
)
def test_bad_words(
    dev: Files, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, words: str
) -> None:
    assert run(argv) == code
    assert words in capsys.readouterr().err


def entry(**values: Any) -> dict[str, Any]:
    return {"protocol": "tcp", "guest": "0.0.0.0:80", "host": "127.0.0.1:8080", "port": 8080, "state": "forwarding",
            "reason": None, "path": "tunnel", "rule": None, **values}


def test_the_table() -> None:
    result = PortsResult("dev", ["8080:80", "ignore:9000", "reverse:5000:5000"], [
        entry(rule="8080:80"),
        entry(protocol="udp", guest="0.0.0.0:53", host="127.0.0.1:53", path="user-network"),
        entry(guest="0.0.0.0:81", host="127.0.0.1:81", state="taken", reason="another process listens"),
        entry(guest="127.0.0.1:5000", host="127.0.0.1:5000", path="reverse", rule="reverse:5000:5000"),
    ], ["a note"])  # fmt: skip
    assert render_ports(result).splitlines() == [
        "HOST              VM              STATE                               RULE",
        "127.0.0.1:8080    0.0.0.0:80      forwarding                          8080:80",
        "127.0.0.1:53/udp  0.0.0.0:53/udp  forwarding by the user network",
        "127.0.0.1:81      0.0.0.0:81      taken: another process listens",
        "127.0.0.1:5000    127.0.0.1:5000  forwarding from the VM to the host  reverse:5000:5000",
        "not forwarded: ignore:9000",
        "a note",
    ]
    assert render_ports(PortsResult("dev", [], [], [])) == "Nothing of dev is forwarded."


def test_from_python(dev: Files) -> None:
    vm = VM("dev")
    vm.forward(9090, "127.0.0.1:90")
    vm.forward("0.0.0.0:53", 53, protocol="udp")
    assert rules() == ["0.0.0.0:53:53/udp", "9090:127.0.0.1:90", "8080:80"]
    assert [entry["state"] for entry in vm.ports()] == ["waiting"] * 3
    vm.unforward(9090, "127.0.0.1:90")
    assert rules() == ["0.0.0.0:53:53/udp", "8080:80"] and "9090" not in dev.config.read_text()


def test_rules_behind_others_say_so(dev: Files, tmp_path: Path) -> None:
    add_rules("dev", ["8081:80"], cwd=tmp_path)
    assert [entry["reason"] for entry in ports("dev").forwards] == ["dev does not run", "8081:80 comes first"]

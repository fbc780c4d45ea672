"""Which address an instance has in the shared network."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qvm.config.resolve import resolve_config
from qvm.errors import QvmError
from qvm.instance import netaddr
from qvm.instance.netaddr import with_number
from qvm.instance.record import GuestUser, Record
from qvm.instance.store import load_record, remove_instance, save_record


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVM_HOME", str(tmp_path))


def make(profile: str, number: int = 0) -> Record:
    config = resolve_config(profile, {"mounts": "none"}, cwd=Path("/"), profile_file=False).config
    record = Record("u", config, "image", "52:54:00:00:00:01", GuestUser("me", 1, 1, "/h"), 1, "tcg", 0.0,
                    network_number=number)
    save_record(record)
    return record


def test_each_instance_gets_the_lowest_free_number_and_keeps_it() -> None:
    first, second = with_number(make("a")), with_number(make("b"))
    assert (first.network_number, second.network_number) == (2, 3)
    assert load_record("a").network_number == 2, "written down before anybody else looks"
    assert with_number(load_record("b")).network_number == 3
    remove_instance("a", data=True)
    assert with_number(make("c")).network_number == 2
    assert with_number(make("d")).network_number == 4


def test_a_number_that_another_has_is_given_up() -> None:
    make("a", 7)
    assert with_number(make("copy", 7)).network_number == 2


def test_a_full_network_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netaddr, "_LAST", 3)
    for name in "ab":
        with_number(make(name))
    with pytest.raises(QvmError, match="all 2 network addresses are taken"):
        with_number(make("c"))


def test_addresses_are_told_from_the_number() -> None:
    assert (netaddr.address(10), netaddr.address6(10), netaddr.mac(10)) == (
        "10.71.86.10", "fd71:766d:1::a", "52:54:00:71:86:0a")


def test_a_record_of_before_has_no_number() -> None:
    data = make("old").to_dict()
    del data["network_number"]
    assert Record.from_dict(data).network_number == 0
    assert dataclasses.replace(Record.from_dict(data), network_number=5).to_dict()["network_number"] == 5

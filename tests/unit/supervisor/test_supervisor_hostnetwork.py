"""What a profile and the host give a guest: names, agent, certificates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qvm.config.model import Config
from qvm.config.ports import SocketPath
from qvm.config.resolve import resolve_config
from qvm.supervisor import hostnetwork
from qvm.supervisor.hostnetwork import (
    AGENT_SOCKET,
    agent_rules,
    agent_variables,
    read_authorities,
    read_network,
    static_hosts,
)

PEM = b"-----BEGIN CERTIFICATE-----\n%s\n-----END CERTIFICATE-----\n"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVM_HOME", str(tmp_path / "q"))


def config(**flags: Any) -> Config:
    return resolve_config("dev", {"mounts": "none", **flags}, cwd=Path("/"), profile_file=False).config


def test_names_of_the_guest_itself() -> None:
    hosts = static_hosts(config(dns_hosts=["a.test=1.2.3.4", "*.b.test=1.2.3.5", "c.test=a.test"],
                                gateway_address="192.168.5.2"))
    assert hosts == {"dev.qvm.internal": "10.0.2.15", "a.test": "1.2.3.4", **dict.fromkeys(
        ("host.docker.internal", "gateway.docker.internal", "host.qvm.internal"), "192.168.5.2")}
    stolen = static_hosts(config(dns_hosts=["host.docker.internal=6.6.6.6"]))
    assert stolen["host.docker.internal"] == "10.0.2.2", "what others rely on stays"


def test_the_network_of_a_profile() -> None:
    network = read_network(config(dns=["127.0.0.1", "9.9.9.9"], dns_hosts=["*.b.test=1.2.3.5", "*.c.test=a.test"],
                                  dns_domains=["corp.example=127.0.0.1,10.9.9.9"], host_loopback="false"), {})
    assert network.nameservers == ("10.0.2.2", "9.9.9.9")
    assert (dict(network.wildcards), dict(network.domains)) == (
        {"b.test": "1.2.3.5"}, {"corp.example": ("10.0.2.2", "10.9.9.9")})
    assert not network.host_loopback and network.is_split()
    assert not read_network(config(), {}).is_split()


def test_the_agent_is_forwarded_where_it_is_wanted_and_there_is_one() -> None:
    wanted, plain = config(forward_agent="true"), config()
    (rule,) = agent_rules(wanted, {"SSH_AUTH_SOCK": "/tmp/a b/agent:1"})
    assert rule.reverse and (rule.guest, rule.host) == (SocketPath(AGENT_SOCKET), SocketPath("/tmp/a b/agent:1"))
    assert agent_rules(wanted, {}) == () == agent_rules(plain, {"SSH_AUTH_SOCK": "/tmp/agent"})
    assert agent_variables(wanted) == {"SSH_AUTH_SOCK": AGENT_SOCKET} and agent_variables(plain) == {}


def test_authorities_are_the_files_and_those_added_to_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = tmp_path / "added" / "team"
    added.mkdir(parents=True)
    (added / "b.crt").write_bytes(PEM % b"B" + PEM % b"A")
    (added / "note.txt").write_bytes(PEM % b"C")
    (tmp_path / "own.pem").write_bytes(b"a comment\n" + PEM % b"A")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(hostnetwork, "_ADDED", ((str(tmp_path / "added"), "*.crt"), (str(tmp_path / "none"), "*")))
    assert read_authorities([str(tmp_path / "own.pem"), "host"]) == (PEM % b"A", PEM % b"B")
    assert read_authorities([]) == ()
    parsed = config(ca_certs=["host", str(tmp_path / "own.pem")])
    assert parsed.ca_certs == ("host", str(tmp_path / "own.pem"))

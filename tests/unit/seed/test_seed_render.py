from __future__ import annotations

import json
import re
import shutil
import subprocess
from base64 import b64decode
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from qvm.config.model import Mount
from qvm.errors import ConfigError
from qvm.seed.data import SeedData, guest_user_name, validate_seed
from qvm.seed.render import fork_document, load_templates, render_seed, seed_document

KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nsecret: {not yaml}\n-----END OPENSSH PRIVATE KEY-----\n"
DATA = SeedData(
    instance_id="11111111-2222-3333-4444-555555555555", hostname="qvm-dev", user="jane", uid=1000, gid=1000,
    home="/home/jane.guest", shell="/bin/bash", authorized_keys=("ssh-ed25519 AAAA 'jane' $x",), host_key=KEY,
    host_key_public="ssh-ed25519 BBBB qvm", mac="52:54:00:AB:cd:01",
    mounts=(
        Mount(Path("/src/a b"), PurePosixPath("/src/a b"), writable=False), Mount(Path("/src"), PurePosixPath("/src")),
    ),
    env={"http_proxy": "http://10.0.2.2:3128/?a=$b"}, dns=("1.1.1.1",), data_folders=("/var/lib/docker",),
)


def load(raw: bytes) -> Any:
    return yaml.safe_load(raw)


def test_files_are_what_nocloud_wants() -> None:
    files = render_seed(DATA)
    assert set(files) == {"meta-data", "user-data", "network-config", "qvm.json", "agent.py", "install-agent.sh",
                          "qvm-agent.service"}
    assert load(files["meta-data"]) == {"instance-id": DATA.instance_id, "local-hostname": "qvm-dev"}
    network = load(files["network-config"])
    assert network["version"] == 2
    assert network["ethernets"]["qvm"]["match"] == {"macaddress": "52:54:00:ab:cd:01"}
    without = load(render_seed(replace(DATA, mac=""))["network-config"])
    assert without["ethernets"]["qvm"]["match"] == {"name": "e*"}


def test_user_data_only_starts_the_agent_and_grows_the_root() -> None:
    files = render_seed(DATA)
    user_data = load(files["user-data"])
    assert user_data["cloud_init_modules"] == ["bootcmd", "growpart", "resizefs"]
    assert user_data["cloud_config_modules"] == user_data["cloud_final_modules"] == user_data["users"] == []
    assert user_data["growpart"]["devices"] == ["/"]
    (command,) = user_data["bootcmd"]
    assert command[:2] == ["sh", "-c"] and "install-agent.sh /run/qvm-seed" in command[2]
    assert KEY not in files["user-data"].decode() and b"jane" not in files["user-data"]


def test_the_disk_carries_the_agent() -> None:
    files, texts = render_seed(DATA), load_templates()
    assert (files["agent.py"], files["install-agent.sh"], files["qvm-agent.service"]) == (
        texts.agent, texts.installer, texts.unit)


def test_the_network_needs_no_dhcp() -> None:
    """A fork's card changes its MAC, and a DHCP server would give it another address than the one ports lead to."""
    network = load(render_seed(DATA)["network-config"])["ethernets"]["qvm"]
    assert (network["dhcp4"], network["addresses"], network["nameservers"]) == (
        False, ["10.0.2.15/24"], {"addresses": ["1.1.1.1"]})
    assert load(render_seed(replace(DATA, dns=()))["network-config"])["ethernets"]["qvm"]["nameservers"] == {
        "addresses": ["10.0.2.3"]}


def test_user_data_passes_cloud_inits_own_schema(tmp_path: Path) -> None:
    program = shutil.which("cloud-init")
    if program is None:
        pytest.skip("cloud-init is not installed; `apt install cloud-init` lets its schema check the seed")
    path = tmp_path / "user-data"
    path.write_bytes(render_seed(DATA)["user-data"])
    subprocess.run([program, "schema", "--config-file", str(path)], check=True)


def test_document_says_everything() -> None:
    document = json.loads(render_seed(DATA)["qvm.json"])
    assert document == seed_document(DATA)
    assert document["user"] == {"name": "jane", "uid": 1000, "gid": 1000, "home": "/home/jane.guest",
                                "shell": "/bin/bash"}
    assert document["mounts"] == [{"tag": "qvm1", "target": "/src", "writable": True},
                                  {"tag": "qvm0", "target": "/src/a b", "writable": False}], "outer folders first"
    assert document["hosts"]["host.docker.internal"] == "10.0.2.2"
    assert document["env"] == DATA.env and document["dns"] == ["1.1.1.1"]
    assert "machine_id" not in document
    assert seed_document(replace(DATA, machine_id="ab" * 16))["machine_id"] == "ab" * 16


def test_rendering_is_pure() -> None:
    assert render_seed(DATA) == render_seed(DATA)
    assert KEY not in repr(DATA)


def test_every_problem_is_reported_at_once() -> None:
    bad = replace(DATA, hostname="two words", user="Jane Doe", home="home:jane", env={"a b": "c", "d": "e\nf"})
    assert [re.split(r"\W", problem)[0] for problem in validate_seed(bad)] == ["hostname", "user", "home", "env", "env"]
    with pytest.raises(ConfigError) as refused:
        render_seed(bad)
    assert len(refused.value.problems) == 5
    assert validate_seed(DATA) == []


@pytest.mark.parametrize(("host", "guest"), [
    ("jane", "jane"), ("john.doe", "john_doe"), ("CORP\\Jane", "jane"), ("1up", "qvm"), ("docker", "qvm"),
    ("www-data", "qvm"), ("", "qvm"), ("名前", "__"), ("x" * 40, "x" * 32),
])
def test_host_user_names_become_account_names(host: str, guest: str) -> None:
    assert guest_user_name(host) == guest


def test_each_fork_gets_an_identity_of_its_own() -> None:
    one, two = (fork_document(DATA, data_disk="bind")["fork"] for _ in range(2))
    assert all(one[name] != two[name] for name in ("entropy", "machine_id", "boot_id", "uuid"))
    assert len(b64decode(one["entropy"])) == 64 and re.fullmatch("[0-9a-f]{32}", one["machine_id"])
    assert (one["mac"], one["data_disk"]) == ("52:54:00:ab:cd:01", "bind")
    assert {key: value for key, value in fork_document(DATA).items() if key != "fork"} == seed_document(DATA)


def test_a_fork_keeps_what_its_instance_has_already() -> None:
    section = fork_document(replace(DATA, machine_id="a" * 32), uuid="u-u-i-d")["fork"]
    assert (section["machine_id"], section["uuid"]) == ("a" * 32, "u-u-i-d")
    with pytest.raises(ConfigError):
        fork_document(replace(DATA, hostname="no name"))

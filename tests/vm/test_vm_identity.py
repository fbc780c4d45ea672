"""Forks of one warm image share nothing that tells one machine from another."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from conftest import User

from qvm.supervisor.client import call

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1800)]

FORKS = int(os.environ.get("QVM_TEST_FORKS", "6"))
"""How many forks are compared. The issue's number is 20."""
# Each line of the answer is NAME VALUE; the same name twice is two things.
LOOK = r"""
say() { echo "$1 $(cat)"; }
date +%s.%N | say clock
hostname | say hostname
cat /etc/machine-id | say machine-id
cat /proc/sys/kernel/random/boot_id | say boot-id
cat /proc/sys/kernel/random/uuid | say kernel-uuid
head -c 32 /dev/urandom | sha256sum | say urandom
python3 -c 'import uuid; print(uuid.uuid4(), uuid.uuid1())' | say uuids
python3 -c 'import random; print(random.random())' | say python-random
cat /sys/class/net/eth0/address | say mac
ip -6 -o addr show dev eth0 scope link | grep -o 'fe80[^/]*' | say link-local
cat /sys/class/net/docker0/address | say bridge
cat /etc/ssh/ssh_host_ed25519_key.pub | cut -d' ' -f2 | say ssh-host-key
for key in /etc/ssh/ssh_host_*_key.pub; do echo "$key"; done | wc -l | say ssh-host-key-count
cat /etc/ssh/authorized_keys.d/* | cut -d' ' -f2 | say authorized-key
openssl genpkey -algorithm ed25519 | sha256sum | say tls-key
docker info --format '{{.ID}}' | say engine-id
docker create --pull=never id/empty /x | say container-id
cat /var/lib/docker/engine-id | say engine-id-file
"""


def look(user: User, name: str) -> dict[str, str]:
    """As root through the agent: twenty SSH handshakes under emulation are a minute."""
    control = Path(user.env["QVM_HOME"]) / "_instances" / name / "ctl.sock"
    answer = call(control, "exec", argv=["sh", "-c", LOOK], exec_timeout=120.0, timeout=130.0)
    assert answer["exit_code"] == 0, answer
    return dict(line.split(" ", 1) for line in answer["stdout"].splitlines())


def test_forks_share_nothing(user: User, busybox_tar: Path) -> None:
    seen: list[dict[str, str]] = []
    for number in range(FORKS):
        name = f"id{number}"
        user.qvm("start", name, "--runtime", "docker", "--mount", "none")
        user.docker("import", str(busybox_tar), "id/empty")
        before = time.time()
        found = look(user, name)
        assert before - 0.05 < float(found["clock"]) < time.time() + 0.05
        assert found.pop("ssh-host-key-count") == "1"
        assert found["engine-id"] == found.pop("engine-id-file")
        pinned = (Path(user.env["QVM_HOME"]) / "_instances" / name / "ssh" / "host_ed25519.pub").read_text()
        assert found["ssh-host-key"] == pinned.split()[1]
        seen.append(found)
        user.qvm("stop", name, "-f")
        user.qvm("delete", name, "-f", "--data")
    for thing in seen[0]:
        values = [entry[thing] for entry in seen]
        assert all(values), thing
        assert len(set(values)) == FORKS, f"{thing} is shared: {sorted(values)}"


def test_the_engine_keeps_its_id_when_it_restarts(user: User) -> None:
    user.qvm("start", "engine", "--runtime", "docker", "--mount", "none")
    ask = ("ssh", "engine", "--", "docker info --format '{{.ID}}'")
    before = user.qvm(*ask).stdout
    user.qvm("ssh", "engine", "--", "systemctl restart docker")
    assert user.qvm(*ask).stdout == before
    user.qvm("delete", "engine", "-f", "--data")

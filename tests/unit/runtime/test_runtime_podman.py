from __future__ import annotations

import asyncio
import tomllib
from dataclasses import replace
from pathlib import Path

from runtime_fakes import FakeGuest, make_context

from qvm.runtime.network import Network
from runtimes.podman import Podman
from runtimes.podman.files import containers_conf, registries_conf

CONTAINERS = "/etc/containers/containers.conf.d/10-qvm.conf"


def test_packages_are_installed_where_podman_is_missing(tmp_path: Path) -> None:
    guest = FakeGuest({"QVM_PROGRAMS": b"missing\n"})
    asyncio.run(Podman().provision(guest, make_context(tmp_path)))
    assert any("podman netavark" in env.get("QVM_APT", "") for env in guest.envs)
    conf = tomllib.loads(guest.files[CONTAINERS].decode())
    assert conf == {"containers": {"host_containers_internal_ip": "10.0.2.2"}}
    assert b"--time=0" in guest.files["/etc/systemd/system/podman.service.d/10-qvm.conf"]
    assert "daemon-reload" in guest.scripts()


def test_a_profiles_tables_are_merged_with_ours() -> None:
    settings = {"containers": {"pids_limit": 5}, "engine": {"runtime": "runc"}}
    assert tomllib.loads(containers_conf(settings, Network()).decode()) == {
        "containers": {"host_containers_internal_ip": "10.0.2.2", "pids_limit": 5}, "engine": {"runtime": "runc"},
    }


def test_mirrors_and_insecure_registries() -> None:
    text = registries_conf(Network(mirrors=("http://m:5000", "https://n"), insecure=("r:5000",))).decode()
    document = tomllib.loads(text)
    assert document["unqualified-search-registries"] == ["docker.io"]
    assert document["registry"] == [
        {"location": "docker.io", "mirror": [{"location": "m:5000", "insecure": True},
                                             {"location": "n", "insecure": False}]},
        {"location": "r:5000", "insecure": True},
    ]


def test_a_fork_is_left_alone_without_settings(tmp_path: Path) -> None:
    guest = FakeGuest()
    asyncio.run(Podman().after_fork(guest, make_context(tmp_path)))
    assert guest.commands == [] and guest.files == {}
    asyncio.run(Podman().after_fork(guest, replace(make_context(tmp_path), network=Network(insecure=("r",)))))
    assert "podman.service" in guest.scripts() and CONTAINERS in guest.files


def test_clients_of_both_kinds_are_told_where(tmp_path: Path) -> None:
    said = Podman().environment(make_context(tmp_path))
    assert said["DOCKER_HOST"] == said["CONTAINER_HOST"] == f"unix://{tmp_path}/qvm/dev/podman.sock"

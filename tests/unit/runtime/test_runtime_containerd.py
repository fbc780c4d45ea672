from __future__ import annotations

import asyncio
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from runtime_fakes import FakeGuest, make_context

from qvm.errors import GuestError
from qvm.runtime.network import Network
from qvm.runtime.toml import render_toml
from runtimes.containerd import Containerd
from runtimes.containerd.files import buildkitd_toml, registry_hosts

IMAGE = (b"containerd\nnerdctl\nbuildctl\nbuildkitd:/usr/local/bin/buildkitd\ncni:/usr/lib/cni\nsystemd\n")
LOOK = "command -v buildkitd"
SOCKET_UNIT = "/etc/systemd/system/buildkit.socket"


def test_provision_writes_the_files_and_reloads_units_once(tmp_path: Path) -> None:
    guest, context = FakeGuest({LOOK: IMAGE}), make_context(tmp_path)

    async def main() -> None:
        for _ in range(2):
            await Containerd().provision(guest, context)

    asyncio.run(main())
    assert guest.commands.count(["systemctl", "daemon-reload"]) == 1
    assert tomllib.loads(guest.files["/etc/nerdctl/nerdctl.toml"].decode()) == {"cni_path": "/usr/lib/cni"}
    worker = tomllib.loads(guest.files["/etc/buildkit/buildkitd.toml"].decode())["worker"]
    assert worker["containerd"] == {"enabled": True, "namespace": "default"} and not worker["oci"]["enabled"]
    assert b"ExecStart=/usr/local/bin/buildkitd --addr fd://" in guest.files["/etc/systemd/system/buildkit.service"]


def test_units_of_the_image_are_kept(tmp_path: Path) -> None:
    guest = FakeGuest({LOOK: IMAGE + b"unit:/usr/lib\n"})
    asyncio.run(Containerd().provision(guest, make_context(tmp_path)))
    assert SOCKET_UNIT not in guest.files and len(guest.commands) == 2


def test_our_own_units_of_an_earlier_start_are_kept_up_to_date(tmp_path: Path) -> None:
    guest = FakeGuest({LOOK: IMAGE + b"unit:/etc\n"})
    asyncio.run(Containerd().provision(guest, make_context(tmp_path)))
    assert SOCKET_UNIT in guest.files


def test_a_guest_without_nerdctl_is_told_what_to_use(tmp_path: Path) -> None:
    guest = FakeGuest({LOOK: b"containerd\ncni:/usr/lib/cni\nbuildkitd:\nsystemd\n"})
    with pytest.raises(GuestError, match="no nerdctl, buildctl, buildkitd") as caught:
        asyncio.run(Containerd().provision(guest, make_context(tmp_path)))
    assert caught.value.hint is not None and "--runtime docker" in caught.value.hint


def test_changed_settings_restart_a_running_containerd(tmp_path: Path) -> None:
    guest = FakeGuest({LOOK: IMAGE + b"unit:/usr/lib\nrunning\n"})
    context = replace(make_context(tmp_path), settings={"grpc": {"gid": 1000}})
    asyncio.run(Containerd().provision(guest, context))
    config = tomllib.loads(guest.files["/etc/containerd/config.toml"].decode())
    assert config["grpc"] == {"gid": 1000} and config["disabled_plugins"] == ["io.containerd.grpc.v1.cri"]
    assert "systemctl restart" in guest.scripts()


def test_ready_waits_for_both_sockets(tmp_path: Path) -> None:
    guest = FakeGuest()
    assert asyncio.run(Containerd().ready(guest, make_context(tmp_path)))
    assert guest.envs[0]["QVM_SOCKETS"] == "/run/containerd/containerd.sock /run/buildkit/buildkitd.sock"


def test_version(tmp_path: Path) -> None:
    said = b"containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6+deb13u1\n"
    assert asyncio.run(Containerd().version(FakeGuest({"--version": said}), make_context(tmp_path))) == (
        "containerd 1.7.24"
    )


def test_toml_reads_back_as_it_was() -> None:
    document = {
        "version": 2, "name": 'a "b" \\ é\n', "ratio": 1.5, "flag": True, "list": ["x", 1],
        "plugins": {"io.containerd.grpc.v1.cri": {"cni": {"bin_dir": "/x y"}}, "empty": {}},
        "last": {"key": "v"},
    }
    read = tomllib.loads(render_toml(document))
    assert read.pop("plugins") == {"io.containerd.grpc.v1.cri": {"cni": {"bin_dir": "/x y"}}}
    assert read == {key: value for key, value in document.items() if key != "plugins"}


def test_what_toml_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="None"):
        render_toml({"key": None})


def test_before_a_freeze_ids_that_are_made_anew_go(tmp_path: Path) -> None:
    guest = FakeGuest()
    asyncio.run(Containerd().before_freeze(guest, make_context(tmp_path)))
    assert len(guest.commands) == 1 and "introspection/uuid" in guest.scripts() and guest.tracked == {}
    assert asyncio.run(Containerd().after_fork(guest, make_context(tmp_path))) == []


def test_registries_reach_nerdctl_and_buildkit(tmp_path: Path) -> None:
    network = Network(mirrors=("http://m:5000",), insecure=("r:5000",), registry_files={"s:443/ca.crt": b"x"})
    hosts = {str(path): tomllib.loads(data.decode()) for path, data in registry_hosts(network).items()}
    assert hosts["/etc/containerd/certs.d/docker.io/hosts.toml"]["host"] == {
        "http://m:5000": {"capabilities": ["pull", "resolve"]},
    }
    insecure = hosts["/etc/containerd/certs.d/r:5000/hosts.toml"]
    assert list(insecure["host"]) == ["http://r:5000", "https://r:5000"]
    assert insecure["host"]["https://r:5000"]["skip_verify"] is True
    assert tomllib.loads(buildkitd_toml(network).decode())["registry"] == {
        "s:443": {"ca": ["/etc/docker/certs.d/s:443/ca.crt"]}, "r:5000": {"http": True, "insecure": True},
        "docker.io": {"mirrors": ["m:5000"]}, "m:5000": {"http": True},
    }


def test_a_fork_is_left_alone_without_settings_and_restarts_with_them(tmp_path: Path) -> None:
    guest = FakeGuest()
    asyncio.run(Containerd().after_fork(guest, make_context(tmp_path)))
    assert guest.commands == [] and guest.files == {}
    asyncio.run(Containerd().after_fork(guest, replace(make_context(tmp_path), settings={"oom_score": -1})))
    assert b"oom_score = -1" in guest.files["/etc/containerd/config.toml"] and "restart" in guest.scripts()

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from runtime_fakes import FakeGuest, make_context

from qvm.errors import GuestError
from qvm.runtime.network import Network
from runtimes.docker import Docker, is_reloadable, render_daemon_json

DAEMON_JSON = "/etc/docker/daemon.json"


def test_provision_installs_nothing_where_docker_is_there(tmp_path: Path) -> None:
    guest = FakeGuest({"command -v dockerd": b"installed\n"})
    asyncio.run(Docker().provision(guest, make_context(tmp_path)))
    assert len(guest.commands) == 2, "each round trip costs tens of milliseconds under emulation"
    assert json.loads(guest.files[DAEMON_JSON]) == {"host-gateway-ip": "10.0.2.2"}


def test_provision_installs_from_the_distribution_where_docker_is_missing(tmp_path: Path) -> None:
    guest = FakeGuest()
    asyncio.run(Docker().provision(guest, make_context(tmp_path)))
    assert {"QVM_APT": "docker.io", "QVM_APK": "docker", "QVM_DNF": "moby-engine"} in guest.envs
    assert guest.commands[-1][-1] == "ann", "the user joins the docker group"


def test_a_failed_installation_keeps_the_package_managers_words(tmp_path: Path) -> None:
    guest = FakeGuest({"apt-get": 100})
    with pytest.raises(GuestError, match="docker could not be installed") as caught:
        asyncio.run(Docker().provision(guest, make_context(tmp_path)))
    assert caught.value.details == "E: Unable to locate package"


def test_the_profiles_settings_reach_daemon_json_and_a_running_daemon(tmp_path: Path) -> None:
    guest = FakeGuest({"command -v dockerd": b"installed\nrunning\n"})
    context = replace(make_context(tmp_path), settings={"registry-mirrors": ["http://m"], "userland-proxy": False})

    async def main() -> None:
        await Docker().provision(guest, context)
        await Docker().provision(guest, context)

    asyncio.run(main())
    assert json.loads(guest.files[DAEMON_JSON]) == {
        "registry-mirrors": ["http://m"], "userland-proxy": False, "host-gateway-ip": "10.0.2.2",
    }
    assert guest.scripts().count("systemctl restart") == 1, "only where the file changed"


def test_start_does_not_wait_and_ready_joins_the_job(tmp_path: Path) -> None:
    guest, context = FakeGuest(), make_context(tmp_path)

    async def main() -> bool:
        await Docker().start(guest, context)
        return await Docker().ready(guest, context)

    assert asyncio.run(main())
    assert "--no-block" in guest.commands[0][2] and guest.commands[0][4:] == ["containerd", "docker"]
    assert "--no-block" not in guest.commands[1][2]
    assert guest.envs[1]["QVM_SOCKETS"] == "/run/docker.sock"


def test_not_ready_yet_is_no_error(tmp_path: Path) -> None:
    assert asyncio.run(Docker().ready(FakeGuest({"exit 3": "late"}), make_context(tmp_path))) is False


def test_a_service_that_failed_is_an_error_with_its_journal(tmp_path: Path) -> None:
    guest = FakeGuest({"exit 3": 3, "journalctl": b"level=fatal msg=nope\n"})
    with pytest.raises(GuestError, match="failed to start") as caught:
        asyncio.run(Docker().ready(guest, make_context(tmp_path)))
    assert caught.value.details is not None and "msg=nope" in caught.value.details


def test_stop_ends_the_socket_first_so_that_nothing_starts_it_again(tmp_path: Path) -> None:
    guest = FakeGuest()
    asyncio.run(Docker().stop(guest, make_context(tmp_path)))
    assert guest.commands[0][4:] == ["docker.socket", "docker", "containerd"]


@pytest.mark.parametrize(
    ("said", "version"),
    [
        (b"Docker version 26.1.5+dfsg1, build a72d7cd\n", "docker 26.1.5"),
        (b"Docker version 28.2.2, build e6534b4\n", "docker 28.2.2"),
    ],
)
def test_version(said: bytes, version: str, tmp_path: Path) -> None:
    assert asyncio.run(Docker().version(FakeGuest({"--version": said}), make_context(tmp_path))) == version


def test_before_a_freeze_the_engine_id_is_tracked(tmp_path: Path) -> None:
    guest = FakeGuest()
    asyncio.run(Docker().before_freeze(guest, make_context(tmp_path)))
    assert guest.tracked == {"docker-engine": ("/var/lib/docker/engine-id", "dockerd")}


def test_after_a_fork_nothing_is_run_where_the_id_was_replaced(tmp_path: Path) -> None:
    guest = FakeGuest()
    assert asyncio.run(Docker().after_fork(guest, make_context(tmp_path))) == []
    assert guest.commands == []


def test_a_daemon_that_kept_its_id_is_started_anew_and_the_user_told(tmp_path: Path) -> None:
    guest = FakeGuest(stale_ids=("docker-engine",))
    notes = asyncio.run(Docker().after_fork(guest, make_context(tmp_path)))
    assert len(notes) == 1 and "started anew" in notes[0]
    assert "systemctl restart" in guest.scripts() and "/run/docker.sock" in str(guest.envs)


def test_wrong_settings_fail_with_dockerds_own_words_before_the_file_is_touched(tmp_path: Path) -> None:
    guest = FakeGuest({"command -v dockerd": b"installed\n", "--validate": 1})
    context = replace(make_context(tmp_path), settings={"nope": 1})
    with pytest.raises(GuestError, match="does not accept") as caught:
        asyncio.run(Docker().provision(guest, context))
    assert caught.value.details and caught.value.hint is not None and "docker:" in caught.value.hint
    assert DAEMON_JSON not in guest.files


def test_a_fork_reloads_what_can_be_reloaded(tmp_path: Path) -> None:
    guest = FakeGuest()
    context = replace(make_context(tmp_path), network=Network(mirrors=("http://m",), insecure=("r:5000",)))
    asyncio.run(Docker().after_fork(guest, context))
    document = json.loads(guest.files[DAEMON_JSON])
    assert document["registry-mirrors"] == ["http://m"] and document["insecure-registries"] == ["r:5000"]
    assert "kill -HUP" in guest.scripts() and "systemctl restart" not in guest.scripts()


def test_a_reload_that_dockerd_refuses_becomes_a_restart(tmp_path: Path) -> None:
    guest = FakeGuest({"kill -HUP": 1})
    context = replace(make_context(tmp_path), network=Network(insecure=("r:5000",)))
    asyncio.run(Docker().after_fork(guest, context))
    assert "systemctl restart" in guest.scripts()


@pytest.mark.parametrize(
    ("settings", "network"),
    [({"log-driver": "journald"}, Network()), ({}, Network(proxies={"http_proxy": "http://p:1"}))],
)
def test_a_fork_restarts_dockerd_for_the_rest(settings: dict[str, str], network: Network, tmp_path: Path) -> None:
    guest = FakeGuest()
    context = replace(make_context(tmp_path), settings=settings, network=network)
    assert asyncio.run(Docker().after_fork(guest, context)) == []
    assert "systemctl restart" in guest.scripts() and "kill -HUP" not in guest.scripts()


def test_registries_of_both_places_are_joined() -> None:
    network = Network(insecure=("a:1",), mirrors=("http://m",))
    document = json.loads(render_daemon_json({"insecure-registries": ["b:2", "a:1"]}, network))
    assert document["insecure-registries"] == ["a:1", "b:2"] and document["registry-mirrors"] == ["http://m"]
    assert is_reloadable({"debug": True}) and not is_reloadable({"debug": True, "userland-proxy": False})

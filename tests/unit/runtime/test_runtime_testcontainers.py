from __future__ import annotations

from pathlib import Path

from qvm.runtime import dockercontext


def test_a_host_that_is_a_container_says_where_ports_are(tmp_path: Path) -> None:
    marker = tmp_path / ".dockerenv"
    plain = dockercontext.testcontainers_variables("/s", marker=marker)
    assert plain == {"TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE": "/s"}
    marker.touch()
    told = dockercontext.testcontainers_variables("/s", marker=marker)
    assert told == {**plain, "TESTCONTAINERS_HOST_OVERRIDE": "localhost",
                    "TESTCONTAINERS_CONNECTION_MODE": "docker_host"}

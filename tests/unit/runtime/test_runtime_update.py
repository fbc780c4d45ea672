from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from runtime_fakes import FakeGuest, make_context

from qvm.cli.update import render_update
from qvm.commands.results import UpdateResult
from qvm.errors import GuestError
from runtimes.containerd import Containerd
from runtimes.docker import Docker
from runtimes.podman import Podman


def result(*changes: str, newer: str | None = None) -> UpdateResult:
    return UpdateResult("dev", bool(changes), list(changes), "docker 27.0", newer, 3.0)


def test_what_changed_is_said_and_that_nothing_did() -> None:
    assert render_update(result()) == "dev is up to date (docker 27.0)"
    text = render_update(result("docker.io: 26.1 -> 27.0", newer="abc"))
    assert text.splitlines()[:2] == ["dev is updated (docker 27.0)", "  docker.io: 26.1 -> 27.0"]
    assert "newer image" in text and "qvm delete dev -f" in text


@pytest.mark.parametrize("runtime", [Docker(), Containerd(), Podman()])
def test_services_are_started_anew_only_where_something_changed(
    runtime: Docker | Containerd | Podman, tmp_path: Path
) -> None:
    guest = FakeGuest({"dpkg-query": b"runc 1.1\n"})
    assert asyncio.run(runtime.update(guest, make_context(tmp_path))) == []
    assert "systemctl restart" not in guest.scripts() and "Error-Mode=any" in guest.scripts()


def test_a_mirror_that_cannot_be_reached_is_an_error_with_its_words(tmp_path: Path) -> None:
    guest = FakeGuest({"--only-upgrade": 100})
    with pytest.raises(GuestError, match="could not be updated") as caught:
        asyncio.run(Docker().update(guest, make_context(tmp_path)))
    assert caught.value.hint is not None and "mirror" in caught.value.hint
    assert "systemctl restart" not in guest.scripts()

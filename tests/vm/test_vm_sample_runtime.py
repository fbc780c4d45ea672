"""A third party's runtime, installed with pip, in a real guest: everything the contract offers."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, User, clear, make_user

pytestmark = [pytest.mark.vm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def web(cache_home: Path) -> Iterator[User]:
    person = make_user(cache_home)
    shutil.copytree(REPOSITORY / "tests" / "sample-runtime", person.home / "source")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", person.home / "site",
                    person.home / "source"], check=True, capture_output=True, timeout=300)
    person.env["PYTHONPATH"] = f"{person.home / 'site'}:{REPOSITORY}"
    started = person.qvm("start", "web", "--runtime", "httpd", "--mount", "none")
    assert "httpd greets as web from now on" in started.stdout + started.stderr
    yield person
    clear(person)


def page(user: User, profile: str = "web") -> str:
    address = (user.home / "q" / profile / "httpd.url").read_text().strip()
    with urllib.request.urlopen(f"{address}hello", timeout=20) as answer:
        return str(answer.read().decode())


def test_its_port_its_socket_and_its_files_reach_the_host(web: User) -> None:
    assert page(web) == "hello from web\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(web.home / "q" / "web" / "httpd.sock"))
        client.sendall(b"GET /hello HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(4096), b""))
    assert b" 200 OK\r\n" in answer and answer.endswith(b"hello from web\n")
    status = web.status("web")
    assert status["runtime_version"].startswith("httpd 1.")
    assert [forward for forward in status["forwards"] if forward["port"] == 8099] == []  # it has a number of its own
    assert "httpd" in web.qvm("logs", "web", "runtime").stdout


def test_a_reboot_and_a_delete_keep_what_lives_on_the_data_disk(web: User) -> None:
    web.qvm("ssh", "web", "--", "echo kept | sudo tee /srv/httpd/mine")
    port = (web.home / "q" / "web" / "httpd.url").read_text()
    web.qvm("restart", "web")
    assert page(web) == "hello from web\n"
    assert (web.home / "q" / "web" / "httpd.url").read_text() == port
    web.qvm("delete", "web", "-f")
    assert not (web.home / "q" / "web" / "httpd.url").exists()
    web.qvm("start", "web", "--runtime", "httpd", "--mount", "none", "--cold")
    assert web.qvm("ssh", "web", "--", "cat /srv/httpd/mine").stdout == "kept\n"
    assert page(web) == "hello from web\n"

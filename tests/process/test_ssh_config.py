"""The ssh configuration that qvm writes, used by the system's ssh against a real sshd."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_sshd import Sshd, running_sshd

from qvm.filenames import Files
from qvm.guest.keys import ensure_key, known_hosts_text, ssh_config_text
from qvm.process import find_program


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A QVM_HOME with what paths may hold: spaces and percent signs."""
    folder = tmp_path / "my 100% home"
    monkeypatch.setenv("QVM_HOME", str(folder))
    Files("dev").ssh_folder.mkdir(parents=True)
    return folder


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    with running_sshd(tmp_path / "sshd") as server:
        yield server


def ssh(files: Files, *words: str) -> subprocess.CompletedProcess[str]:
    program = find_program("ssh")
    if program is None:
        pytest.skip("needs the OpenSSH client: apt-get install openssh-client")
    return subprocess.run([program, "-F", files.ssh_config, "-o", "BatchMode=yes", *words], capture_output=True,
                          text=True, timeout=30, stdin=subprocess.DEVNULL, check=False)


def write(sshd: Sshd) -> Files:
    files = Files("dev")
    for name in ("client", "client.pub"):
        target = files.ssh_key if name == "client" else files.ssh_key.with_suffix(".pub")
        shutil.copy(sshd.folder / name, target)
    files.known_hosts.write_text(known_hosts_text("dev", sshd.port, sshd.folder / "host"))
    files.ssh_config.write_text(ssh_config_text(files, user=sshd.user, port=sshd.port))
    return files


def test_ssh_logs_in_with_the_pinned_key_and_nothing_else(home: Path, sshd: Sshd) -> None:
    files = write(sshd)
    done = ssh(files, "qvm-dev", "echo in")
    assert (done.returncode, done.stdout) == (0, "in\n"), done.stderr
    ssh(files, "-O", "exit", "qvm-dev")


def test_ssh_refuses_another_host_key(home: Path, sshd: Sshd, tmp_path: Path) -> None:
    files = write(sshd)
    ensure_key(tmp_path / "other", comment="other")
    files.known_hosts.write_text(known_hosts_text("dev", sshd.port, tmp_path / "other"))
    before = files.known_hosts.read_text()
    done = ssh(files, "qvm-dev", "echo in")
    assert done.returncode == 255 and "Host key verification failed" in done.stderr
    assert files.known_hosts.read_text() == before


def test_ssh_reads_each_option_as_it_was_meant(home: Path) -> None:
    files = Files("dev")
    files.ssh_config.write_text(ssh_config_text(files, user="ann", port=2222))
    done = ssh(files, "-G", "qvm-dev")
    options = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert (options["hostname"], options["port"], options["user"]) == ("127.0.0.1", "2222", "ann")
    assert options["stricthostkeychecking"] in ("true", "yes") and options["identitiesonly"] == "yes"
    assert str(files.ssh_key) in (options["identityfile"].replace("%%", "%"), options["identityfile"])
    assert options["hostkeyalias"] == "qvm-dev"

"""~/.ssh/config of a user, with the real ssh reading it."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest

from qvm import paths
from qvm.commands.ssh_include import settle_ssh_config
from qvm.config.resolve import resolve_config
from qvm.filenames import Files
from qvm.guest.keys import ssh_config_text
from qvm.instance.record import GuestUser, Record
from qvm.instance.store import remove_instance, save_record
from qvm.process import find_program


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("QVM_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "my home" / ("vms" if name == "QVM_HOME" else "")))
    (tmp_path / "my home" / "vms").mkdir(parents=True)
    return tmp_path / "my home"


def make_instance(profile: str, *, wanted: bool, port: int) -> None:
    config = resolve_config(profile, {"mounts": "none", "ssh_config": wanted}, cwd=Path("/"), profile_file=False).config
    record = Record("u", config, "image", "52:54:00:00:00:01", GuestUser("me", 1, 1, "/home/me"), port, "tcg", 0.0)
    save_record(dataclasses.replace(record))
    files = Files(profile)
    paths.ensure_private_dir(files.ssh_folder)
    files.ssh_config.write_text(ssh_config_text(files, user="me", port=port, forward_agent=wanted))


def effective(config: Path, host: str) -> dict[str, str]:
    """What `ssh -G` makes of it."""
    program = find_program("ssh")
    if program is None:
        pytest.skip("needs the OpenSSH client: apt-get install openssh-client")
    done = subprocess.run([program, "-F", config, "-G", host], capture_output=True, text=True, check=True)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def test_only_instances_that_want_it_are_included_and_the_rest_is_as_it_was(home: Path) -> None:
    theirs = home / ".ssh" / "config"
    dotfiles = home / "dotfiles"
    dotfiles.write_bytes(b"Host other\n  User somebody\n# \xe9 and no line end")
    dotfiles.chmod(0o640)
    theirs.parent.mkdir()
    theirs.symlink_to(dotfiles)
    before = dotfiles.read_bytes()
    make_instance("a", wanted=True, port=2201)
    make_instance("b", wanted=False, port=2202)
    assert settle_ssh_config() == [] == settle_ssh_config(wanted=False)
    seen = effective(theirs, "qvm-a")
    assert (seen["port"], seen["user"], seen["forwardagent"]) == ("2201", "me", "yes")
    assert seen["stricthostkeychecking"] in ("true", "yes")
    assert effective(theirs, "qvm-b")["port"] == "22"
    assert effective(theirs, "other")["user"] == "somebody", "what stood there holds still"
    assert theirs.is_symlink() and dotfiles.stat().st_mode & 0o777 == 0o640
    remove_instance("a", data=True)
    assert settle_ssh_config() == []
    assert dotfiles.read_bytes() == before and theirs.is_symlink()
    assert not (home / "vms" / "ssh_config").exists()


def test_a_file_that_was_not_there_comes_and_goes(home: Path) -> None:
    make_instance("a", wanted=True, port=2201)
    assert settle_ssh_config() == []
    theirs = home / ".ssh" / "config"
    assert theirs.stat().st_mode & 0o777 == 0o600 and theirs.parent.stat().st_mode & 0o777 == 0o700
    assert effective(theirs, "qvm-a")["port"] == "2201"
    make_instance("a", wanted=False, port=2201)
    settle_ssh_config(wanted=False)
    assert not theirs.exists()


def test_nothing_is_touched_where_nobody_wants_it(home: Path) -> None:
    make_instance("b", wanted=False, port=2202)
    assert settle_ssh_config(wanted=False) == [] and not (home / ".ssh").exists()

"""Keeps `ssh qvm-PROFILE` working for the instances whose profile has `sshConfig`."""

from __future__ import annotations

from pathlib import Path

from qvm import paths
from qvm.errors import InstanceStateError
from qvm.filenames import Files
from qvm.guest.sshinclude import add_include, remove_include
from qvm.instance.store import find_record, list_profiles
from qvm.locks import lock


def settle_ssh_config(*, wanted: bool = True) -> list[str]:
    """Have ~/.ssh/config include the blocks of the instances that want it, or nothing of ours where none does.

    `wanted` False: the caller knows of none, so that where nothing of ours is there nothing need be read. Returns
    notes: what could not be written.
    """
    blocks = paths.home() / "ssh_config"
    if not wanted and not blocks.exists():
        return []
    user_file = Path.home() / ".ssh" / "config"
    try:
        with lock(paths.instances_dir() / ".ssh_config.lock", what="the SSH configuration", timeout=10):
            text = _blocks()
            if text:
                paths.replace_file(blocks, text.encode(), durable=False)
                _rewrite(user_file, add_include(_read(user_file), blocks))
            else:
                old = _read(user_file)
                if old is not None:
                    _rewrite(user_file, remove_include(old, blocks))
                blocks.unlink(missing_ok=True)
    except OSError as error:
        return [f"{user_file} was left as it is: {error.strerror}; `qvm ssh-config` prints the lines"]
    return []


def _blocks() -> str:
    found = []
    for profile in list_profiles():
        try:
            record = find_record(profile)
        except InstanceStateError:
            continue  # damaged: `qvm list` tells
        file = Files(profile).ssh_config
        if record is not None and record.config.ssh_config and file.exists():
            found.append(file.read_text())
    return "\n".join(found)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _rewrite(path: Path, text: bytes | None) -> None:
    """In one step, through a symbolic link and with the mode as it is."""
    target = path.resolve()
    old = _read(target)
    if text == old:
        return
    if text is None:
        target.unlink()
        return
    if old is None:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = target.stat().st_mode & 0o7777 if old is not None else 0o600
    paths.replace_file(target, text, mode=mode)

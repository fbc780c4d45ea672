"""A program on the host that stands for one in the guest: `nerdctl` for `qvm nerdctl`."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from qvm.errors import HostError
from qvm.paths import replace_file

_MARK = "# made by `qvm nerdctl install`"
_SYSTEM = Path("/usr/local/bin")


@dataclass(frozen=True, slots=True)
class Alias:
    path: Path
    on_path: bool
    """Whether the shell finds it."""

    def lines(self) -> list[str]:
        found = [f"made {self.path}"]
        if not self.on_path:
            found.append(f"  its folder is not in your PATH: export PATH={shlex.quote(str(self.path.parent))}:$PATH")
        return found


def install_alias(client: str, profile: str, *, path: Path | None = None, force: bool = False) -> Alias:
    """Make an executable that runs `client` in the instance `profile`; `qvm -p` and QVM_PROFILE win over that.

    `path`: the file; None: in /usr/local/bin where we may write there, else in ~/.local/bin. HostError where there is
    a file that is not ours, unless `force`, or where it cannot be written.
    """
    if path is None:
        folder = _SYSTEM if os.access(_SYSTEM, os.W_OK) else Path.home() / ".local" / "bin"
        path = folder / client
    elif path.is_dir():
        path = path / client
    text = alias_script(client, profile)
    try:
        ours = not path.exists() or _MARK in path.read_text(errors="replace")
        if not ours and not force:
            raise HostError(f"{path} exists and is not qvm's", hint="--force replaces it; --path makes it elsewhere")
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode(), mode=0o755, durable=False)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}", hint="--path FILE makes it elsewhere") from error
    folders = os.environ.get("PATH", "").split(os.pathsep)
    return Alias(path, str(path.parent) in folders)


def alias_script(client: str, profile: str) -> str:
    """The program that made it is the one that is asked, with the Python it ran under."""
    python = shlex.quote(sys.executable)
    return (f"#!/bin/sh\n{_MARK}\n"
            f'exec {python} -m qvm {client} -p "${{QVM_PROFILE:-{shlex.quote(profile)}}}" -- "$@"\n')

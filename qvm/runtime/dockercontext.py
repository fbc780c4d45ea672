"""docker contexts of qvm's instances, made and switched without the docker CLI.

Format (docker CLI 28, cli/context/store): a context is `contexts/meta/<sha256 of its name>/meta.json` in docker's
configuration folder, and `currentContext` in `config.json` beside it names the current one; absent means `default`.

What was current before a switch is kept in the context itself (`QvmPrevious` in its Metadata; docker keeps fields it
does not know), so that instances started and stopped in any order end where the user began: an instance that stops
while another one remembers it hands its own predecessor on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvm.runtime.base import RuntimeContext
from qvm.runtime.hostfiles import replace_file
from qvm.runtime.jsonedit import get_string, set_string

DEFAULT = "default"
STATE_FILE = "docker-context.json"
PREVIOUS = "QvmPrevious"


class ForeignContextError(Exception):
    """A context of the wanted name exists and is not ours."""


def activate_context(context: RuntimeContext, *, socket: str, switch: bool) -> list[str]:
    """`Runtime.activate` of a runtime whose host socket of that name speaks docker's API."""
    folder = config_folder(context.env)
    name, path = context_name(context.profile), context.host_socket(socket)
    notes = []
    try:
        DockerContexts(folder, context.folder.parent).publish(
            name, host=f"unix://{path}", description=f"qvm: the instance {context.profile!r}", switch=switch
        )
        _remember_folder(context, folder)
    except ForeignContextError as error:
        notes.append(f"a docker context {name!r} that is not qvm's exists ({error}) and was left alone; "
                     f"use DOCKER_HOST=unix://{path}")
    except (OSError, ValueError) as error:
        notes.append(f"docker's configuration in {folder} could not be changed ({error}); "
                     f"use DOCKER_HOST=unix://{path}")
    for variable in ("DOCKER_HOST", "DOCKER_CONTEXT"):
        if switch and context.env.get(variable):
            notes.append(f"{variable} is set and overrides the docker context {name!r}: unset {variable}")
    return notes


def deactivate_context(context: RuntimeContext, *, remove: bool) -> list[str]:
    """`Runtime.deactivate` to that."""
    folder = _remembered_folder(context) or config_folder(context.env)
    try:
        DockerContexts(folder, context.folder.parent).withdraw(context_name(context.profile), remove=remove)
        if remove:
            (context.state_folder / STATE_FILE).unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        return [f"docker's configuration in {folder} could not be changed back: {error}"]
    return []


def _remember_folder(context: RuntimeContext, folder: Path) -> None:
    """`stop` may run with another DOCKER_CONFIG than `start` did, and must mend what start changed."""
    context.state_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (context.state_folder / STATE_FILE).write_text(json.dumps({"config": str(folder)}) + "\n")


def _remembered_folder(context: RuntimeContext) -> Path | None:
    try:
        return Path(json.loads((context.state_folder / STATE_FILE).read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # never activated, or the file is damaged: the environment says where


def config_folder(env: Mapping[str, str]) -> Path:
    """docker's configuration folder: `DOCKER_CONFIG` or ~/.docker."""
    explicit = env.get("DOCKER_CONFIG")
    if explicit:
        return Path(explicit).absolute()
    return (Path(env["HOME"]) if env.get("HOME") else Path.home()) / ".docker"


def context_name(profile: str) -> str:
    return "qvm" if profile == "default" else f"qvm-{profile}"


@dataclass(frozen=True, slots=True)
class DockerContexts:
    """The contexts in one configuration folder. Ours are those whose socket is below `home`.

    Methods raise OSError and ValueError (a config.json that is no JSON) and then have changed nothing that matters.
    """

    folder: Path
    home: Path

    def publish(self, name: str, *, host: str, description: str, switch: bool) -> None:
        """Make or refresh the context, and make it the current one. ForeignContextError where the name is taken."""
        with self._locked():
            meta = self._load(name)
            if meta is not None and not self._is_ours(meta):
                raise ForeignContextError(_host_of(meta))
            previous = None if meta is None else _previous_of(meta)
            config = self._read_config() if switch else None
            if config is not None:
                current = get_string(config, "currentContext")
                if current != name:
                    previous = current or ""
            self._save(name, host=host, description=description, previous=previous)
            if config is not None:
                self._write_config(config, set_string(config, "currentContext", name))

    def withdraw(self, name: str, *, remove: bool) -> None:
        """Make current what was current before, if this context still is; with `remove`, delete it. Idempotent."""
        if not self.folder.is_dir():
            return
        with self._locked():
            meta = self._load(name)
            if meta is None or not self._is_ours(meta):
                return
            previous = _previous_of(meta)
            # "" stands for no choice at all; None says that the user made this context current, not we.
            inherited = "" if previous is None and remove else previous
            if inherited is not None:
                self._hand_on(name, inherited)
                self._switch_back(name, inherited)
            if remove:
                self._delete(name)
            elif previous is not None:
                self._save(name, host=_host_of(meta), description=_description_of(meta), previous=None)

    def _hand_on(self, name: str, inherited: str) -> None:
        """Contexts of ours that would switch back to `name` shall switch back to its own predecessor."""
        for meta in self._load_all():
            other = str(meta.get("Name"))
            if other != name and self._is_ours(meta) and _previous_of(meta) == name:
                self._save(other, host=_host_of(meta), description=_description_of(meta),
                           previous="" if inherited == other else inherited)

    def _switch_back(self, name: str, inherited: str) -> None:
        config = self._read_config()
        if get_string(config, "currentContext") != name:
            return  # the user, or another instance, has switched meanwhile
        known = inherited == DEFAULT or (inherited != "" and self._load(inherited) is not None)
        self._write_config(config, set_string(config, "currentContext", inherited if known else None))

    # -- files --

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One of us at a time; docker itself does not lock."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fd = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _meta_path(self, name: str) -> Path:
        return self.folder / "contexts" / "meta" / hashlib.sha256(name.encode()).hexdigest() / "meta.json"

    def _load(self, name: str) -> dict[str, Any] | None:
        try:
            meta = json.loads(self._meta_path(name).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}  # something is there that nobody can read: nobody's, so not ours
        return meta if isinstance(meta, dict) else {}

    def _load_all(self) -> list[dict[str, Any]]:
        names = []
        for path in (self.folder / "contexts" / "meta").glob("*/meta.json"):
            try:
                names.append(str(json.loads(path.read_bytes())["Name"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # a context of somebody else, broken as it may be
        return [meta for name in sorted(names) if (meta := self._load(name)) is not None]

    def _save(self, name: str, *, host: str, description: str, previous: str | None) -> None:
        metadata = {"Description": description} | ({} if previous is None else {PREVIOUS: previous})
        meta = {
            "Name": name,
            "Metadata": metadata,
            "Endpoints": {"docker": {"Host": host, "SkipTLSVerify": False}},
        }
        path = self._meta_path(name)
        data = json.dumps(meta, separators=(",", ":"), ensure_ascii=False).encode()
        if path.is_file() and path.read_bytes() == data:
            return
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        replace_file(path, data, mode=0o644)

    def _delete(self, name: str) -> None:
        path = self._meta_path(name)
        path.unlink(missing_ok=True)
        path.parent.rmdir()

    def _is_ours(self, meta: dict[str, Any]) -> bool:
        host = _host_of(meta)
        return host.startswith("unix://") and Path(host.removeprefix("unix://")).is_relative_to(self.home)

    def _read_config(self) -> str:
        try:
            return (self.folder / "config.json").read_bytes().decode()
        except FileNotFoundError:
            return "{}"

    def _write_config(self, before: str, after: str) -> None:
        """Replace config.json where it is, through symlinks, with the mode it had."""
        if after == before:
            return
        path = (self.folder / "config.json").resolve()
        mode = path.stat().st_mode & 0o7777 if path.exists() else 0o600
        replace_file(path, after.encode(), mode=mode)


def _host_of(meta: dict[str, Any]) -> str:
    try:
        return str(meta["Endpoints"]["docker"]["Host"])
    except (KeyError, TypeError):
        return ""


def _description_of(meta: dict[str, Any]) -> str:
    return str(meta["Metadata"].get("Description", ""))


def _previous_of(meta: dict[str, Any]) -> str | None:
    metadata = meta.get("Metadata")
    value = metadata.get(PREVIOUS) if isinstance(metadata, dict) else None
    return value if isinstance(value, str) else None


def testcontainers_variables(socket: str, *, marker: Path = Path("/.dockerenv")) -> dict[str, str]:
    """What testcontainers must be told. `socket`: where a container can mount the engine's from, in the guest.

    On a host that is a container itself (`marker` is there) it would look for published ports at that one's gateway.
    """
    told = {"TESTCONTAINERS_DOCKER_SOCKET_OVERRIDE": socket}
    if marker.exists():
        told |= {"TESTCONTAINERS_HOST_OVERRIDE": "localhost", "TESTCONTAINERS_CONNECTION_MODE": "docker_host"}
    return told

"""The user's kubeconfig files: which one is meant, locked, replaced whole, with what is needed to put it back.

Which file kubectl changes where KUBECONFIG names several: k8s.io/client-go/tools/clientcmd, `GetDefaultFilename`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qvm.runtime.hostfiles import replace_file

from . import kubeconfig
from .kubeconfig import ForeignEntryError
from .yamledit import CannotEditError

_MARK = "\ufeff"
"""Editors of another system begin a file with it; places in the text are counted behind it."""
LOCK_PATIENCE = 5.0
"""Seconds another writer may hold a file. kubectl's own changes take milliseconds."""


class LockedError(OSError):
    """Another program has been changing the file for too long."""


def find_files(env: Mapping[str, str]) -> list[Path]:
    """The files that make up the user's kubeconfig, in kubectl's order."""
    named = [Path(part) for part in env.get("KUBECONFIG", "").split(os.pathsep) if part]
    return list(dict.fromkeys(named)) or [Path(env.get("HOME") or str(Path.home())) / ".kube" / "config"]


def default_file(files: list[Path]) -> Path:
    """Where new entries go: the first that exists, else the last."""
    return next((path for path in files if path.exists()), files[-1])


@dataclass(frozen=True, slots=True)
class Published:
    """What was changed, for changing it back."""

    path: str
    created: bool = False
    """The file was made by us."""
    current_path: str = ""
    """Where the current context was switched; "": it was not."""
    previous: str | None = None
    """How the former current context was spelled there; None: the key was absent."""
    former: dict[str, str | None] = field(default_factory=dict)
    """`kubeconfig.former_lists` of the file before us."""

    @classmethod
    def load(cls, path: Path) -> Published | None:
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(json.dumps({name: getattr(self, name) for name in self.__slots__}) + "\n")


def publish(files: list[Path], entries: dict[str, dict[str, Any]], state: Path, *, home: str, switch: bool) -> None:
    """Have `entries` in the user's kubeconfig and, where `switch`, their context the current one.

    `state` remembers how to undo it. Raises CannotEditError, ForeignEntryError, OSError.
    """
    name = str(entries["contexts"]["name"])
    known = Published.load(state)
    path = Path(known.path) if known is not None and Path(known.path).exists() else default_file(files)
    created = known.created if known is not None and known.path == str(path) else not path.exists()
    current_path = _current_file(files, path)
    if known is not None and known.path != str(path):
        known = None
    with _changing(path) as (text, write):
        write(kubeconfig.merge(text, entries, home=home))
        former = kubeconfig.former_lists(text)
    done = known or Published(str(path), created, former=former)
    done.save(state)
    if not switch:
        return
    with _changing(current_path) as (text, write):
        there = kubeconfig.current(text)
        if there is not None and there[0] == name:
            return
        write(kubeconfig.set_current(text, kubeconfig.spell(name)))
        replace(done, current_path=str(current_path), previous=None if there is None else there[1]).save(state)


def withdraw(name: str, state: Path, *, home: str, drop: bool) -> None:
    """Put the current context back, where it is still ours; `drop` takes the entries out too. Idempotent."""
    known = Published.load(state)
    if known is None:
        return
    if known.current_path:
        _restore_current(name, known, home=home)
        known = replace(known, current_path="", previous=None)
        known.save(state)
    if not drop:
        return
    path = Path(known.path)
    if path.exists():
        with _changing(path) as (text, write):
            rest = kubeconfig.remove(text, name, home=home, former=known.former)
            if known.created and rest.strip() == kubeconfig.SKELETON.strip():
                path.resolve().unlink()
            else:
                write(rest)
    state.unlink(missing_ok=True)


def _restore_current(name: str, known: Published, *, home: str) -> None:
    path = Path(known.current_path)
    if not path.exists():
        return
    with _changing(path) as (text, write):
        there = kubeconfig.current(text)
        if there is None or there[0] != name:
            return  # the user has chosen another one since
        previous = known.previous
        before = kubeconfig.current(kubeconfig.set_current(text, previous))
        # One of ours that is gone by now would only be in the way.
        if before is not None and _is_ours_by_name(before[0]) and before[0] not in kubeconfig.context_names(text):
            previous = '""'
        write(kubeconfig.set_current(text, previous))


def _is_ours_by_name(name: str) -> bool:
    return name == "qvm" or name.startswith("qvm-")


def _current_file(files: list[Path], fallback: Path) -> Path:
    """The file whose current context counts: the first that names one."""
    for path in files:
        if not path.exists():
            continue
        try:
            there = kubeconfig.current(_read(path).removeprefix(_MARK))
        except CannotEditError:
            continue  # kubectl cannot read it either, and says so better than we could
        if there is not None and there[0]:
            return path
    return fallback


@contextmanager
def _changing(path: Path) -> Iterator[tuple[str, Any]]:
    """The text of a file that nobody else changes meanwhile, and what replaces it; an absent file is empty."""
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    with _locked(path):
        whole = _read(target)
        mark = _MARK if whole.startswith(_MARK) else ""

        def write(changed: str) -> None:
            if mark + changed != whole or not target.exists():
                _replace(target, (mark + changed).encode())

        yield whole.removeprefix(mark), write


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as error:
        raise CannotEditError("is not UTF-8 text") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """kubectl's lock: `<file>.lock`, made by one and removed by the same (client-go, clientcmd/loader.go)."""
    lock = Path(f"{path}.lock")
    end = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            break
        except FileExistsError as error:
            if time.monotonic() > end:
                raise LockedError(f"{lock} says that another program is changing it; remove that file if none is"
                                  ) from error
            time.sleep(0.02)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _replace(target: Path, data: bytes) -> None:
    """With the mode it had; a new one is for its owner alone."""
    replace_file(target, data, mode=target.stat().st_mode & 0o7777 if target.exists() else 0o600)


__all__ = ["CannotEditError", "ForeignEntryError", "Published", "default_file", "find_files", "publish", "withdraw"]

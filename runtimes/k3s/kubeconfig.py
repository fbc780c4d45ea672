"""An instance's entries in a kubeconfig: put in, taken out, made current; pure text in, pure text out.

The format: kubernetes.io/docs/reference/config-api/kubeconfig.v1. Entries that are ours carry an extension `qvm` that
names the QVM_HOME they belong to, which kubectl keeps when it rewrites a file.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from .yamledit import (
    CannotEditError,
    add_item,
    add_key,
    compose,
    get_scalar,
    load,
    null_spelling,
    remove_item,
    set_empty,
    set_scalar,
)

LISTS = ("clusters", "contexts", "users")
CURRENT = "current-context"
EXTENSION = "qvm"
SKELETON = "apiVersion: v1\nkind: Config\n"


class ForeignEntryError(Exception):
    """Somebody else's entry has the name of ours."""


@dataclass(frozen=True, slots=True)
class Access:
    """How a client reaches a cluster; certificates and key are base64, as k3s writes them."""

    server: str
    authority: str
    certificate: str
    key: str


def context_name(profile: str) -> str:
    return "qvm" if profile == "default" else f"qvm-{profile}"


def parse_k3s(text: str, *, port: int) -> Access:
    """What k3s's own kubeconfig says, with the host's port. ValueError where it is none."""
    try:
        document = yaml.safe_load(text)
        user = document["users"][0]["user"]
        return Access(
            f"https://127.0.0.1:{port}", document["clusters"][0]["cluster"]["certificate-authority-data"],
            user["client-certificate-data"], user["client-key-data"],
        )
    except (yaml.YAMLError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"k3s's kubeconfig is not as expected: {error!r}") from error


def build_entries(name: str, access: Access, *, home: str) -> dict[str, dict[str, Any]]:
    """List -> our entry in it."""
    mark = [{"extension": {"home": home}, "name": EXTENSION}]
    return {
        "clusters": {"cluster": {"certificate-authority-data": access.authority, "extensions": mark,
                                 "server": access.server}, "name": name},
        "contexts": {"context": {"cluster": name, "extensions": copy.deepcopy(mark), "user": name}, "name": name},
        "users": {"name": name, "user": {"client-certificate-data": access.certificate,
                                         "client-key-data": access.key, "extensions": copy.deepcopy(mark)}},
    }


def render(name: str, access: Access, *, home: str) -> str:
    """A kubeconfig of this instance alone."""
    text = SKELETON
    for key, entry in build_entries(name, access, home=home).items():
        text = add_item(text, key, entry)
    return set_scalar(text, CURRENT, spell(name))


def merge(text: str, entries: dict[str, dict[str, Any]], *, home: str) -> str:
    """`text` with our entries as given and nothing else changed.

    ForeignEntryError where somebody else's entry has one of the names, CannotEditError where it cannot be done safely.
    """
    before = load(text)
    changed = text
    if not text.strip():
        changed = SKELETON
    elif compose(text) is None:  # comments alone
        changed = add_key(add_key(text, "apiVersion", "v1"), "kind", "Config")
    for key, entry in entries.items():
        there = _find_entry(changed, key, entry["name"])
        if there is not None:
            number, found = there
            if found == entry:
                continue
            if not is_ours(key, found, home):
                raise ForeignEntryError(f"an entry {entry['name']!r} in {key}")
            changed = remove_item(changed, key, number)
        changed = add_item(changed, key, entry)
    _verify(before, load(changed), {entry["name"] for entry in entries.values()}, expected=entries)
    return changed


def former_lists(text: str) -> dict[str, str | None]:
    """Lists that are absent (None), or there without a value (`users: null`), as they are spelled."""
    there = load(text)
    spelled = {key: null_spelling(text, key) for key in LISTS}
    return {key: value for key, value in spelled.items() if key not in there or value is not None}


def remove(text: str, name: str, *, home: str, former: Mapping[str, str | None] | None = None) -> str:
    """`text` without our entries of that name; those of somebody else stay. `former`: `former_lists` before them."""
    before = load(text)
    for key in LISTS:
        there = _find_entry(text, key, name)
        if there is not None and is_ours(key, there[1], home):
            text = remove_item(text, key, there[0])
            if former is not None and key in former:
                text = set_empty(text, key, former[key])
    _verify(before, load(text), {name}, expected=None)
    return text


def current(text: str) -> tuple[str, str] | None:
    """The current context and how it is spelled; None where the file has no such key."""
    return get_scalar(text, CURRENT)


def set_current(text: str, spelled: str | None) -> str:
    """The current context as `spelled` says; None takes the key out."""
    before = load(text)
    text = set_scalar(text, CURRENT, spelled)
    after = load(text)
    if {**before, CURRENT: None} != {**after, CURRENT: None}:
        raise CannotEditError("would not be the same in everything else")
    return text


def spell(name: str) -> str:
    """A name as a YAML value."""
    return name if name.replace("-", "").replace("_", "").isalnum() and name[0].isalpha() else json.dumps(name)


def context_names(text: str) -> list[str]:
    return [str(entry.get("name")) for entry in load(text).get("contexts") or () if isinstance(entry, dict)]


def is_ours(key: str, entry: dict[str, Any], home: str) -> bool:
    body = entry.get(key.removesuffix("s"))
    extensions = body.get("extensions") if isinstance(body, dict) else None
    return any(
        isinstance(item, dict) and item.get("name") == EXTENSION and (item.get("extension") or {}).get("home") == home
        for item in extensions or ()
    )


def _find_entry(text: str, key: str, name: str) -> tuple[int, dict[str, Any]] | None:
    entries = load(text).get(key) or []
    if not isinstance(entries, list):
        raise CannotEditError(f"has {key} that are not a list")
    for number, entry in enumerate(entries):
        if isinstance(entry, dict) and entry.get("name") == name:
            return number, entry
    return None


def _verify(
    before: dict[str, Any], after: dict[str, Any], names: set[str], *, expected: dict[str, dict[str, Any]] | None
) -> None:
    """Only ours differs, order included; else CannotEditError and nothing is written."""
    if _others(before, names) != _others(after, names):
        raise CannotEditError("would not be the same in everything else")
    for key, entry in (expected or {}).items():
        if entry not in after.get(key, ()):
            raise CannotEditError(f"does not take an entry in {key}")


def _others(document: dict[str, Any], names: set[str]) -> list[tuple[str, Any]]:
    rest = []
    for key, value in document.items():
        if key in LISTS and (value is None or isinstance(value, list)):
            kept = [entry for entry in value or () if not (isinstance(entry, dict) and entry.get("name") in names)]
            if kept:
                rest.append((key, kept))
        elif not (key in ("apiVersion", "kind") and value in ("v1", "Config")):
            rest.append((key, value))
    return rest

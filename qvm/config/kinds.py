"""How values are read and written: one class per kind of value, used by rows of the settings table.

A raw value is what a flag, an environment variable or a YAML node gives: a string, a list of them or a mapping.
(Scalars of a file arrive as they were typed, so `no`, `1_000` and `12:30` keep their spelling.) Programs may pass
numbers, booleans and paths. `parse` raises RejectedError with every problem; `dump` is its inverse, for YAML.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from qvm.arch import ALL, find_arch, host_arch
from qvm.config.context import Context, Problem, RejectedError, reject
from qvm.config.model import Mount
from qvm.units import GiB, KiB, MiB, format_size, parse_size


def _text(raw: object) -> str:
    """A raw scalar as text; RejectedError on lists and mappings."""
    if isinstance(raw, Mapping):
        raise reject("must be one value, not a mapping")
    if isinstance(raw, list | tuple):
        raise reject("must be one value, not a list")
    return str(raw).strip()


def _items(raw: object) -> list[object]:
    """A raw list; a single scalar stands for a list of one."""
    if isinstance(raw, Mapping):
        raise reject("must be a list, not a mapping")
    return list(raw) if isinstance(raw, list | tuple) else [raw]


class Kind(ABC):
    """One kind of value."""

    multiple = False
    """The flag may be given several times."""
    boolean = False
    """The flag takes no value."""

    @abstractmethod
    def parse(self, raw: object, context: Context) -> Any: ...

    @abstractmethod
    def schema(self) -> dict[str, Any]:
        """The JSON Schema of `dump`'s result and of whatever else a file may say."""

    def dump(self, value: Any) -> Any:
        return value

    def restore(self, stored: Any) -> Any:
        """The value of the form an instance's record keeps (JSON)."""
        return stored

    def show(self, value: Any) -> str:
        """A few words for messages."""
        return str(value)


@dataclass(frozen=True, slots=True)
class Text(Kind):
    def parse(self, raw: object, context: Context) -> str:
        return _text(raw)

    def schema(self) -> dict[str, Any]:
        return {"type": "string"}


@dataclass(frozen=True, slots=True)
class ImageName(Text):
    """A name, an address, or a file: anything with a slash, made absolute."""

    def parse(self, raw: object, context: Context) -> str:
        text = _text(raw)
        if "://" in text or "/" not in text:
            return text
        if text.startswith("~/"):
            text = f"{context.home()}{text[1:]}"
        return str((context.cwd / text).resolve())


@dataclass(frozen=True, slots=True)
class Count(Kind):
    def parse(self, raw: object, context: Context) -> int:
        text = _text(raw)
        if re.fullmatch(r"[+-]?\d+", text) is None:
            raise reject(f"{text!r} is not a whole number")
        return int(text)

    def schema(self) -> dict[str, Any]:
        return {"type": "integer"}


@dataclass(frozen=True, slots=True)
class Size(Kind):
    """Bytes; a bare number counts GiB."""

    def parse(self, raw: object, context: Context) -> int:
        try:
            return parse_size(_text(raw))
        except RejectedError:
            raise
        except ValueError as error:
            raise reject(str(error)) from error

    def dump(self, value: int) -> str:
        for unit, size in (("GiB", GiB), ("MiB", MiB), ("KiB", KiB)):
            if value % size == 0:
                return f"{value // size}{unit}"
        return f"{value}B"

    def show(self, value: int) -> str:
        return format_size(value)

    def schema(self) -> dict[str, Any]:
        return {"type": ["number", "string"], "pattern": r"^\d+(\.\d+)?\s*([KMGT](i?B)?|B)?$"}


@dataclass(frozen=True, slots=True)
class Switch(Kind):
    boolean = True

    def parse(self, raw: object, context: Context) -> bool:
        text = _text(raw).lower()
        if text in ("true", "yes", "on", "1"):
            return True
        if text in ("false", "no", "off", "0"):
            return False
        raise reject(f"{text!r} is neither true nor false")

    def show(self, value: bool) -> str:  # noqa: FBT001  the value itself, not an option
        return "on" if value else "off"

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class ArchName(Kind):
    """An architecture by any of its names, or `host`."""

    def parse(self, raw: object, context: Context) -> str:
        text = _text(raw)
        arch = host_arch() if text == "host" else find_arch(text)
        if arch is None:
            known = ", ".join(each.name for each in ALL)
            raise reject(f"{text!r} is not an architecture qvm knows; one of {known}")
        return arch.name

    def schema(self) -> dict[str, Any]:
        return {"type": "string"}


@dataclass(frozen=True, slots=True)
class TextList(Kind):
    multiple = True

    def parse(self, raw: object, context: Context) -> tuple[str, ...]:
        texts: list[str] = []
        problems: list[Problem] = []
        for number, item in enumerate(_items(raw)):
            try:
                texts.append(_text(item))
            except RejectedError as error:
                problems += [Problem(problem.text, (number, *problem.path)) for problem in error.problems]
        if problems:
            raise RejectedError(*problems)
        return tuple(texts)

    def dump(self, value: tuple[str, ...]) -> list[str]:
        return list(value)

    def restore(self, stored: Any) -> tuple[str, ...]:
        return tuple(stored)

    def show(self, value: tuple[str, ...]) -> str:
        return ", ".join(value) or "none"

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": {"type": "string"}}


@dataclass(frozen=True, slots=True)
class Variables(Kind):
    """Environment variables: a mapping, or a list of KEY=VALUE."""

    multiple = True

    def parse(self, raw: object, context: Context) -> dict[str, str]:
        values: dict[str, str] = {}
        problems: list[Problem] = []
        pairs: list[tuple[int | str, object, object]]
        if isinstance(raw, Mapping):
            pairs = [(str(key), key, value) for key, value in raw.items()]
        else:
            pairs = []
            for number, item in enumerate(_items(raw)):
                name, equals, text = str(item).partition("=")
                if equals:
                    pairs.append((number, name, text))
                else:
                    problems.append(Problem(f"{item!s} has no value; write {item!s}=VALUE", (number,)))
        for step, key, value in pairs:
            if isinstance(value, Mapping | list | tuple):
                problems.append(Problem(f"the value of {key} must be text", (step,)))
            else:
                values[str(key)] = str(value)
        if problems:
            raise RejectedError(*problems)
        return values

    def dump(self, value: dict[str, str]) -> dict[str, str]:
        return dict(value)

    def show(self, value: dict[str, str]) -> str:
        # Values may be secrets: names are enough to say what changed.
        return ", ".join(value) or "none"

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean", "null"]}}


_WRITABLE = {"w": True, "rw": True, "ro": False}


@dataclass(frozen=True, slots=True)
class Mounts(Kind):
    """Host folders: SRC[:DST][:w|:rw|:ro][:mmap], or a mapping of source, target, writable, mmap; `none` for none."""

    multiple = True

    def parse(self, raw: object, context: Context) -> tuple[Mount, ...]:
        items = _items(raw)
        if [str(item).strip() for item in items] == ["none"]:
            return ()
        mounts: list[Mount] = []
        problems: list[Problem] = []
        for number, item in enumerate(items):
            try:
                mounts.append(self._parse_one(item, context))
            except RejectedError as error:
                problems += [Problem(problem.text, (number, *problem.path)) for problem in error.problems]
        if problems:
            raise RejectedError(*problems)
        return tuple(mounts)

    def _parse_one(self, item: object, context: Context) -> Mount:
        if isinstance(item, Mount):
            return item
        if isinstance(item, Mapping):
            return self._parse_mapping(item, context)
        text = _text(item)
        if text == "none":
            raise reject("`none` means no mount at all and cannot stand beside others")
        parts = text.split(":")
        writable, mmap = True, False
        while len(parts) > 1 and parts[-1] in (*_WRITABLE, "mmap"):
            word = parts.pop()
            writable, mmap = _WRITABLE.get(word, writable), mmap or word == "mmap"
        if len(parts) > 2 or not all(parts):
            raise reject(
                f"{text!r} is not SRC[:DST][:ro]; "
                "a path with a colon in it goes into the profile file, as `source:` and `target:`"
            )
        return _build_mount(parts[0], parts[1] if len(parts) == 2 else None, context, writable=writable, mmap=mmap)

    def _parse_mapping(self, item: Mapping[Any, object], context: Context) -> Mount:
        problems = [
            Problem(f"unknown key {key!r}; a mount has source, target, writable and mmap", (str(key),))
            for key in item
            if key not in ("source", "target", "writable", "mmap")
        ]
        if "source" not in item:
            problems.append(Problem("a mount needs a source"))
        switches = {"writable": True, "mmap": False}
        for name, default in switches.items():
            try:
                switches[name] = Switch().parse(item.get(name, str(default).lower()), context)
            except RejectedError as error:
                problems += [Problem(problem.text, (name,)) for problem in error.problems]
        if problems:
            raise RejectedError(*problems)
        target = _text(item["target"]) if "target" in item else None
        return _build_mount(_text(item["source"]), target, context, **switches)

    def dump(self, value: tuple[Mount, ...]) -> Any:
        return [mount.to_dict() for mount in value] or "none"

    def restore(self, stored: Any) -> tuple[Mount, ...]:
        return tuple(item if isinstance(item, Mount) else Mount.from_dict(item) for item in stored)

    def show(self, value: tuple[Mount, ...]) -> str:
        return ", ".join(show_mount(mount) for mount in value) or "none"

    def schema(self) -> dict[str, Any]:
        mapping = {
            "type": "object",
            "required": ["source"],
            "additionalProperties": False,
            "properties": {
                "source": {"type": "string"},
                "target": {"type": "string"},
                "writable": {"type": "boolean", "default": True},
                "mmap": {"type": "boolean", "default": False},
            },
        }
        return {"anyOf": [{"const": "none"}, {"type": "array", "items": {"anyOf": [{"type": "string"}, mapping]}}]}


def _build_mount(source: str, target: str | None, context: Context, *, writable: bool, mmap: bool) -> Mount:
    if source == "~" or source.startswith("~/"):
        source = str(context.home()) + source[1:]
    path = context.cwd / source
    if ".." in path.parts:
        path = path.resolve()
    if target is None:
        return Mount(path, PurePosixPath(path), writable, mmap)
    if not target.startswith("/"):
        raise reject(f"the target {target!r} must be an absolute path in the guest (or one of w, rw, ro)")
    # POSIX lets two leading slashes mean something else, so PurePosixPath keeps them; Linux does not.
    return Mount(path, PurePosixPath("/" + target.lstrip("/")), writable, mmap)


def show_mount(mount: Mount) -> str:
    """SRC[:DST][:ro][:mmap], as it can be typed."""
    same = Path(mount.target) == mount.source
    words = ("" if same else f":{mount.target}", "" if mount.writable else ":ro", ":mmap" if mount.mmap else "")
    return f"{mount.source}{''.join(words)}"

"""Settings of runtimes and of what they reach: sections passed on to them, registries, proxies, certificates."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvm.config.context import Context, Plain, Problem, RejectedError, reject
from qvm.config.kinds import Kind, TextList

PROXY_KEYS = ("http", "https", "all", "no")
HOST_AUTHORITIES = "host"
"""Stands among files of certificates for what the host's administrator has added to its own."""
_NUMBER = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_REGISTRY = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?)(:\d{1,5})?(/\d{1,3})?")
_MOST_CERTIFICATES = 1 << 20


@dataclass(frozen=True, slots=True)
class Section(Kind):
    """Settings that qvm does not know but passes on: a mapping of whatever JSON can say.

    A file's scalars without quotes are read as JSON (and YAML 1.2) reads them; quoted ones are text.
    """

    def parse(self, raw: object, context: Context) -> dict[str, Any]:
        if not isinstance(raw, Mapping):
            raise reject("must be a mapping, `key: value` lines")
        return {str(key): _parse_tree(value, (str(key),)) for key, value in raw.items()}

    def schema(self) -> dict[str, Any]:
        return {"type": "object"}

    def show(self, value: dict[str, Any]) -> str:
        # Values may be secrets: names are enough to say what changed.
        return ", ".join(value) or "none"


def _parse_tree(raw: object, path: tuple[str | int, ...]) -> Any:
    if isinstance(raw, Mapping):
        return {str(key): _parse_tree(value, (*path, str(key))) for key, value in raw.items()}
    if isinstance(raw, list | tuple):
        return [_parse_tree(value, (*path, number)) for number, value in enumerate(raw)]
    if isinstance(raw, Plain):
        return _parse_plain(raw)
    if raw is None or isinstance(raw, str | bool | int | float):
        return raw
    raise reject(f"{raw!r} is not text, a number or a truth value", *path)


def _parse_plain(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    number = _NUMBER.fullmatch(text)
    if number is None:
        return str(text)
    return int(text) if number[2] is None and number[3] is None else float(text)


@dataclass(frozen=True, slots=True)
class Proxies(Kind):
    """A mapping of http, https, all and no; `none`, or `host` for what the host's environment says."""

    def parse(self, raw: object, context: Context) -> dict[str, str] | None:
        if isinstance(raw, str) and raw.strip() in ("none", "host"):
            return {} if raw.strip() == "none" else None
        if not isinstance(raw, Mapping):
            raise reject("must be none, host, or a mapping with http, https, all and no")
        values: dict[str, str] = {}
        problems: list[Problem] = []
        for key, value in raw.items():
            name = str(key).lower().removesuffix("_proxy")
            if name not in PROXY_KEYS:
                problems.append(Problem(f"unknown key {key!r}; proxies has {', '.join(PROXY_KEYS)}", (str(key),)))
            elif isinstance(value, Mapping):
                problems.append(Problem("must be text", (str(key),)))
            else:
                items = value if isinstance(value, list | tuple) else [value]
                values[name] = ",".join(str(item).strip() for item in items)
        if problems:
            raise RejectedError(*problems)
        return values

    def dump(self, value: dict[str, str] | None) -> Any:
        return "host" if value is None else dict(value) or "none"

    def show(self, value: dict[str, str] | None) -> str:
        # Addresses may hold passwords.
        return "the host's" if value is None else ", ".join(value) or "none"

    def schema(self) -> dict[str, Any]:
        keys = {key: {"type": "string"} for key in PROXY_KEYS}
        return {"anyOf": [{"enum": ["none", "host"]},
                          {"type": "object", "properties": keys, "additionalProperties": False}]}


@dataclass(frozen=True, slots=True)
class Files(TextList):
    """Paths of files of the host's, kept absolute; or `HOST_AUTHORITIES`."""

    def parse(self, raw: object, context: Context) -> tuple[str, ...]:
        texts = TextList.parse(self, raw, context)
        home = str(context.home())
        return tuple(
            text if text == HOST_AUTHORITIES else
            str(context.cwd / (home + text[1:] if text == "~" or text.startswith("~/") else text)) for text in texts
        )


def validate_mirrors(value: Sequence[str], context: Context) -> list[Problem]:
    from urllib.parse import urlsplit

    problems = []
    for number, text in enumerate(value):
        try:
            parts = urlsplit(text)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query
        except ValueError:
            good = False
        if not good:
            problems.append(Problem(f"{text!r} is not an address like https://mirror.example", (number,)))
    return problems


def validate_registries(value: Sequence[str], context: Context) -> list[Problem]:
    return [
        Problem(f"{text!r} is not HOST[:PORT]", (number,))
        for number, text in enumerate(value) if _REGISTRY.fullmatch(text) is None
    ]


def validate_proxies(value: Mapping[str, str] | None, context: Context) -> list[Problem]:
    problems = []
    for key, text in (value or {}).items():
        if "\n" in text or "\0" in text or '"' in text:
            problems.append(Problem("must be one line of text without quotes", (key,)))
        elif key != "no" and not re.fullmatch(r"([a-z][a-z0-9+.-]*://)?[^\s/]+(/\S*)?", text):
            problems.append(Problem(f"{text!r} is not a proxy's address, such as http://proxy.example:3128", (key,)))
    return problems


def validate_ca_certs(value: Sequence[str], context: Context) -> list[Problem]:
    problems = []
    for number, name in enumerate(value):
        if name == HOST_AUTHORITIES:
            continue
        path = Path(name)
        try:
            if path.stat().st_size > _MOST_CERTIFICATES:
                text = f"{path} is too large to be certificates"
            elif b"-----BEGIN CERTIFICATE-----" not in path.read_bytes():
                text = f"{path} holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)"
            else:
                continue
        except OSError as error:
            text = f"{path} cannot be read: {error.strerror}"
        problems.append(Problem(text, (number,)))
    return problems

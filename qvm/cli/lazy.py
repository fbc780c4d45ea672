"""A click group that imports a verb's module only when that verb is used, and offers the nearest for a wrong word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import click


@dataclass(frozen=True, slots=True)
class Verb:
    """Where a verb's command is, and what stands in the list of verbs without importing it."""

    module: str
    attribute: str
    help: str
    aliases: tuple[str, ...] = ()

    def load(self) -> click.Command:
        command = getattr(import_module(self.module), self.attribute)
        assert isinstance(command, click.Command)
        return command


class Interrupted(Exception):
    """A KeyboardInterrupt that click has not seen: it would print an empty line first."""


class LazyGroup(click.Group):
    def __init__(self, *, verbs: Mapping[str, Verb], **attributes: Any) -> None:
        super().__init__(**attributes)
        self.verbs = verbs
        self._by_alias = {alias: name for name, verb in verbs.items() for alias in verb.aliases}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = self.verbs.get(self._by_alias.get(cmd_name, cmd_name))
        return verb.load() if verb is not None else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if not word.startswith("-") and word not in self.verbs and word not in self._by_alias:
            raise click.UsageError(f"unknown verb {word!r}{suggest(word, [*self.verbs, *self._by_alias])}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise Interrupted from interrupt

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name, verb in self.verbs.items():
            aliases = f" ({', '.join(verb.aliases)})" if verb.aliases else ""
            rows.append((name + aliases, verb.help))
        with formatter.section("Verbs"):
            formatter.write_dl(rows)


class AliasGroup(click.Group):
    """A verb with verbs of its own, some of which have other words too."""

    def __init__(self, *, aliases: Mapping[str, str], **attributes: Any) -> None:
        super().__init__(**attributes)
        self.aliases = aliases

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = self.aliases.get(args[0], args[0])
        if not word.startswith("-") and word not in self.commands:
            raise click.UsageError(f"unknown verb {args[0]!r}{suggest(word, list(self.commands))}", ctx)
        return super().resolve_command(ctx, [word, *args[1:]])


def suggest(word: str, known: Sequence[str]) -> str:
    """"; did you mean X?" where something near is known, else nothing."""
    from difflib import get_close_matches

    begun = [name for name in known if name.startswith(word)]
    near = begun or get_close_matches(word, known, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""

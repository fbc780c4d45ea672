"""The flags of `start`, made from the settings table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from qvm.config.settings import SETTINGS, Setting

F = TypeVar("F", bound=Callable[..., Any])


def setting_options(function: F) -> F:
    """Add one option per row. Values stay as typed: `resolve_config` reads them and tells all that is wrong at once."""
    for setting in reversed(SETTINGS):
        function = _option(setting)(function) if setting.flags else function
    return function


def some_setting_options(*fields: str) -> Callable[[F], F]:
    """Like `setting_options`, for a verb that heeds only some of the settings."""

    def decorate(function: F) -> F:
        for setting in reversed([entry for entry in SETTINGS if entry.field in fields]):
            function = _option(setting)(function)
        return function

    return decorate


def take_flags(options: dict[str, Any]) -> dict[str, Any]:
    """Move the settings that were given out of a verb's options: Config field -> as typed."""
    flags = {setting.field: options.pop(setting.field) for setting in SETTINGS if setting.field in options}
    return {field: value for field, value in flags.items() if value is not None and value != ()}


def _option(setting: Setting) -> Callable[[F], F]:
    help_text = f"{setting.help[0].upper()}{setting.help[1:]}. [{setting.default_text}]"
    if setting.kind.boolean:
        return click.option(*setting.flags, setting.field, default=None, help=help_text)
    return click.option(
        *setting.flags, setting.field, metavar=setting.metavar, multiple=setting.kind.multiple, default=None,
        help=help_text, shell_complete=_completer(setting),
    )  # fmt: skip


def _completer(setting: Setting) -> Callable[[click.Context, click.Parameter, str], list[Any]] | None:
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        if setting.field == "image":
            return complete_image(ctx, param, incomplete)
        if setting.field == "mounts":
            return [CompletionItem(incomplete, type="dir")]
        names = setting.choices() if setting.choices is not None else ()
        return [name for name in names if name.startswith(incomplete)]

    known = setting.choices is not None or setting.field in ("image", "mounts")
    return complete if known else None


def complete_image(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """Names in the catalogue and ids in the cache."""
    from qvm.commands.image import list_images

    names = {str(item.get("name", "")) for item in list_images()}
    return sorted(name for name in names if name.startswith(incomplete))

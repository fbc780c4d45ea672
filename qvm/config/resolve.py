"""From what was said in many places to one Config.

A flag wins over what an existing instance cannot change, that over the environment, the profile file, the template and
the default.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvm import paths
from qvm.config.context import Context, Problem, RejectedError, Step
from qvm.config.load import Tree, load_settings_file
from qvm.config.model import Config
from qvm.config.names import validate_profile_name
from qvm.config.settings import BY_FIELD, BY_KEY, SETTINGS, Change, Setting, find_setting
from qvm.config.validate import find_misfits
from qvm.errors import ConfigError
from qvm.filenames import Files

FLAG, STORED, ENVIRONMENT, FILE, TEMPLATE = "flag", "stored", "environment", "file", "template"


@dataclass(frozen=True, slots=True)
class Resolved:
    config: Config
    explicit: Mapping[str, str]
    """Config field -> where it came from: flag, stored, environment, file or template; defaults are absent."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One place that may say something."""

    origin: str
    values: Mapping[str, Any]
    """File key -> value, parsed."""
    where: Callable[[Setting, tuple[Step, ...]], str]


def template_file() -> Path:
    """Settings for every new profile."""
    return paths.home() / "_templates" / "default.yaml"


def resolve_config(
    profile: str,
    flags: Mapping[str, Any],
    *,
    stored: Mapping[str, Any] | None = None,
    cwd: Path,
    environ: Mapping[str, str] | None = None,
    profile_file: bool = True,
) -> Resolved:
    """The settings of the next start of `profile`; one that is made for a moment has no `profile_file`.

    `flags` maps file keys (or Config fields) to raw values as typed or as a program gives them; None counts as not
    given. `stored` is the existing instance's Config, as its record keeps it (Config fields). `environ` is
    os.environ unless given. Raises ConfigError with every problem.
    """
    name_problems = validate_profile_name(profile)
    if name_problems:
        raise ConfigError([f"--profile: {problem}" for problem in name_problems])
    context = Context(profile, cwd, os.environ if environ is None else environ)
    problems: list[str] = []
    layers = {
        FLAG: _flag_layer(flags, context, problems),
        STORED: _stored_layer(stored),
        ENVIRONMENT: _environment_layer(context, problems),
        FILE: _file_layer(FILE, Files(profile).config if profile_file else None, context, problems),
        TEMPLATE: _file_layer(TEMPLATE, template_file(), context, problems),
    }
    values: dict[str, Any] = {}
    explicit: dict[str, str] = {}
    notes: list[str] = []
    for setting in SETTINGS:
        problems += _find_forbidden_change(setting, layers, profile)
        layer = next((layer for layer in _order(setting, layers) if setting.key in layer.values), None)
        value = setting.default(context) if layer is None else layer.values[setting.key]
        where = layer.where if layer is not None else _where_default
        problems += [f"{where(setting, found.path)}: {found.text}" for found in setting.validate(value, context)]
        remark = (setting.remark_default if layer is None else setting.remark)(value, context)
        notes += [remark] if remark else []
        values[setting.field] = value
        if layer is not None:
            explicit[setting.field] = layer.origin
    if not problems:
        problems += find_misfits(values["arch"], values["memory"])
    if problems:
        unique = list(dict.fromkeys(problems))
        raise ConfigError(unique, hint="`qvm start --help` shows every setting with its default")
    return Resolved(Config(profile=profile, **values), explicit, notes)


def describe_changes(old: Config, new: Config) -> list[str]:
    """One line per setting that differs: "cpus: 2 -> 4"."""
    lines = []
    for setting in SETTINGS:
        before, after = getattr(old, setting.field), getattr(new, setting.field)
        if before != after:
            lines.append(f"{setting.key}: {setting.kind.show(before)} -> {setting.kind.show(after)}")
    return lines


def _order(setting: Setting, layers: Mapping[str, _Layer]) -> Iterator[_Layer]:
    """The layers in which to look for a setting, first wins."""
    yield layers[FLAG]
    if setting.change is Change.FREE:
        yield layers[ENVIRONMENT]
        yield layers[FILE]
        # The profile file holds what a profile had; where it is gone, or the default depends on the folder a
        # command was typed in, what the instance had is still nearer to the wish than a template.
        if setting.sticky or not layers[FILE].values:
            yield layers[STORED]
    else:
        if setting.change in (Change.GROWS, Change.SWITCHES) and layers[STORED].values:
            yield layers[FILE]
        yield layers[STORED]
        yield layers[ENVIRONMENT]
        yield layers[FILE]
    yield layers[TEMPLATE]


def _find_forbidden_change(setting: Setting, layers: Mapping[str, _Layer], profile: str) -> list[str]:
    """What a flag or the file asks for that the existing instance cannot become."""
    if setting.change in (Change.FREE, Change.SWITCHES) or setting.key not in layers[STORED].values:
        return []
    old = layers[STORED].values[setting.key]
    layer = next((layers[name] for name in (FLAG, FILE) if setting.key in layers[name].values), None)
    if layer is None:
        return []
    new = layer.values[setting.key]
    show = setting.kind.show
    if setting.change is Change.FIXED and new != old:
        mend = f"`qvm delete {profile} -f`, then start again (the data disk stays)"
        fixed = f"{profile!r} was made with {show(old)}, which cannot become {show(new)}"
        return [f"{layer.where(setting, ())}: {fixed}; {mend}"]
    if setting.change is Change.GROWS and new < old:
        data = " --data" if setting.key == "disk" else ""
        mend = f"keep {show(old)} or more, or begin anew after `qvm delete {profile} -f{data}`"
        return [f"{layer.where(setting, ())}: {show(old)} cannot shrink to {show(new)}; {mend}"]
    return []


def _where_default(setting: Setting, path: tuple[Step, ...]) -> str:
    return f"{setting.key} (default)"


def _flag_layer(flags: Mapping[str, Any], context: Context, problems: list[str]) -> _Layer:
    def where(setting: Setting, path: tuple[Step, ...]) -> str:
        return setting.flag

    raw: dict[str, Any] = {}
    for name, value in flags.items():
        setting = find_setting(name)
        if setting is None:
            problems.append(f"{name}: there is no such setting{_suggest(name)}")
        elif value is not None:
            raw[setting.key] = value
    return _Layer(FLAG, _parse(raw, where, context, problems), where)


def _suggest(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, [*BY_KEY, *BY_FIELD], 1)
    return f"; did you mean {near[0]}?" if near else ""


def _environment_layer(context: Context, problems: list[str]) -> _Layer:
    def where(setting: Setting, path: tuple[Step, ...]) -> str:
        return setting.env or setting.key

    raw = {
        setting.key: context.environ[setting.env]
        for setting in SETTINGS
        if setting.env is not None and context.environ.get(setting.env)
    }
    return _Layer(ENVIRONMENT, _parse(raw, where, context, problems), where)


def _file_layer(origin: str, path: Path | None, context: Context, problems: list[str]) -> _Layer:
    loaded, wrong = load_settings_file(path, BY_KEY) if path is not None else (None, [])
    problems += wrong
    raw: Mapping[str, Tree] = loaded.values if loaded is not None else {}

    def where(setting: Setting, path: tuple[Step, ...]) -> str:
        place = loaded.where(setting.key, *path) if loaded is not None else origin
        return f"{place}: {setting.key}"

    return _Layer(origin, _parse(raw, where, context, problems), where)


def _stored_layer(stored: Mapping[str, Any] | None) -> _Layer:
    def where(setting: Setting, path: tuple[Step, ...]) -> str:
        return f"{setting.key} (as it was before)"

    known = stored or {}
    values = {row.key: row.kind.restore(known[row.field]) for row in SETTINGS if row.field in known}
    return _Layer(STORED, values, where)


def _parse(
    raw: Mapping[str, Any],
    where: Callable[[Setting, tuple[Step, ...]], str],
    context: Context,
    problems: list[str],
) -> dict[str, Any]:
    """Every value read as its kind. Values that a nearer layer hides must be readable too, but need not make sense."""
    values: dict[str, Any] = {}
    for key, value in raw.items():
        setting = BY_KEY[key]
        try:
            values[key] = setting.kind.parse(value, context)
        except RejectedError as error:
            found: tuple[Problem, ...] = error.problems
            problems += [f"{where(setting, problem.path)}: {problem.text}" for problem in found]
    return values

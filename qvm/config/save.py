"""Writing profile files: a new one with every setting, and single settings of one the user may have edited.

An existing file is changed line by line, so that its comments, order and spelling stay; the result is read back
before it replaces the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvm import paths
from qvm.config.load import parse_settings
from qvm.config.model import Config
from qvm.config.resolve import ENVIRONMENT, FLAG, Resolved
from qvm.config.settings import BY_FIELD, BY_KEY, SETTINGS, Setting
from qvm.errors import HostError
from qvm.filenames import Files
from qvm.paths import replace_file

if TYPE_CHECKING:
    from yaml.nodes import Node

_HEADER = """\
# Settings of the qvm profile {profile!r}: change them here or with flags of `qvm start {profile}`;
# they take effect at the next start. `qvm start --help` explains each.
"""


def save_profile(resolved: Resolved) -> list[str]:
    """Keep the settings for later starts; returns notes on what could not be kept.

    Makes the profile file with every setting where there is none; else only writes what a flag or a variable of the
    environment said. Raises HostError where the folder cannot be written to.
    """
    config = resolved.config
    path = Files(config.profile).config
    if not path.exists():
        paths.ensure_private_dir(path.parent)
        _write(path, render_profile(config))
        return []
    text = path.read_text(encoding="utf-8")
    said = [BY_FIELD[name] for name, origin in resolved.explicit.items() if origin in (FLAG, ENVIRONMENT)]
    changed = {setting.key: setting.kind.dump(getattr(config, setting.field)) for setting in said}
    updated = update_text(text, changed)
    if updated is None:
        return [f"{path} could not be changed line by line; put there what shall hold for later starts yourself"]
    if updated != text:
        _write(path, updated)
    return []


def save_setting(profile: str, key: str, value: Any) -> list[str]:
    """Set one key of a profile file that exists; returns notes on what could not be kept."""
    path = Files(profile).config
    if not path.exists():
        return [f"there is no {path} to keep it in"]
    text = path.read_text(encoding="utf-8")
    updated = update_text(text, {key: BY_KEY[key].kind.dump(value)})
    if updated is None:
        return [f"{path} could not be changed line by line; put {key} there yourself"]
    if updated != text:
        _write(path, updated)
    return []


def render_profile(config: Config) -> str:
    """A new profile file. Pure."""
    lines = [_HEADER.format(profile=config.profile)]
    for setting in SETTINGS:
        value = getattr(config, setting.field)
        lines.append(_comment(setting) + _render(setting.key, setting.kind.dump(value)))
    return "\n".join(lines)


def update_text(text: str, changes: Mapping[str, Any]) -> str | None:
    """The text of a profile file with some keys set anew; None where it is written in a way this cannot follow."""
    import yaml

    for key, value in changes.items():
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            return None
        if root is not None and (not isinstance(root, yaml.MappingNode) or root.flow_style):
            return None
        entries = root.value if root is not None else []
        entry = next(((name, node) for name, node in entries if name.value == key), None)
        rendered = _render(key, value)
        if entry is None:
            text = text + ("" if not text or text.endswith("\n") else "\n") + rendered
        elif _same(text, key, rendered):
            continue
        else:
            start, end = entry[0].start_mark.index, _end(entry[1])
            end = start + len(text[start:end].rstrip("\n"))  # a block of text counts its last line's end as its own
            text = text[:start] + rendered.rstrip("\n") + text[end:]
    return text if all(_same(text, key, _render(key, value)) for key, value in changes.items()) else None


def _same(text: str, key: str, rendered: str) -> bool:
    """Whether `text` says for `key` what `rendered` says."""
    known = {*BY_KEY, key}
    ours, problems = parse_settings(text, Path(), known)
    theirs, _ = parse_settings(rendered, Path(), known)
    return not problems and ours is not None and theirs is not None and ours.values.get(key) == theirs.values.get(key)


def _end(node: Node) -> int:
    """Index behind a value: a block collection's own end mark lies behind the comments that follow it."""
    from yaml.nodes import MappingNode, SequenceNode

    if isinstance(node, SequenceNode | MappingNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(node, MappingNode) else last)
    return int(node.end_mark.index)


def _comment(setting: Setting) -> str:
    what = setting.help[0].upper() + setting.help[1:]
    choices = f"; one of {', '.join(setting.choices())}" if setting.choices is not None else ""
    return f"# {what}{choices} ({setting.change.value}).\n"


def _render(key: str, value: Any) -> str:
    import yaml

    return yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, default_flow_style=False, width=1000)


def _write(path: Path, text: str) -> None:
    """Replace the file atomically, 0600: environment variables in it may be secrets."""
    try:
        replace_file(path.resolve(), text.encode())
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}", hint="free some space or set QVM_HOME") from error

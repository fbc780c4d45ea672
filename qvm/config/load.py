"""Profile files: YAML in which every value knows its line and column, and every problem is told at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from qvm.config.context import Plain, Step

if TYPE_CHECKING:
    from yaml.nodes import MappingNode, Node, ScalarNode

Tree: TypeAlias = "str | list[Tree] | dict[str, Tree]"
"""A value as it was typed: scalars keep their spelling."""

_DEEPEST = 8


@dataclass(frozen=True, slots=True)
class SettingsFile:
    path: Path
    values: Mapping[str, Tree]
    marks: Mapping[tuple[Step, ...], tuple[int, int]] = field(default_factory=dict)
    """Path of a value -> its line and column, counted from 1."""

    def where(self, *path: Step) -> str:
        """`file:line:column` of a value, or of the nearest thing around it."""
        for length in range(len(path), 0, -1):
            mark = self.marks.get(path[:length])
            if mark is not None:
                return f"{self.path}:{mark[0]}:{mark[1]}"
        return str(self.path)


def load_settings_file(path: Path, known: Collection[str]) -> tuple[SettingsFile | None, list[str]]:
    """What a file says and everything that is wrong with its form; (None, []) where there is no file.

    `known` are the keys there are. A key without a value counts as not given.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None, []
    except UnicodeDecodeError as error:
        return None, [f"{path}: is not UTF-8 text (byte {error.start})"]
    except OSError as error:
        return None, [f"{path}: cannot be read: {error.strerror}"]
    return parse_settings(text, path, known)


def parse_settings(text: str, path: Path, known: Collection[str]) -> tuple[SettingsFile | None, list[str]]:
    """Like `load_settings_file`, of a text already read."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        return None, [f"{where}: {error.problem or 'is not YAML'}"]
    except yaml.YAMLError as error:
        return None, [f"{path}: {str(error).splitlines()[0]}"]
    reader = _Reader(path)
    if root is None or _is_null(root):
        return SettingsFile(path, {}), []
    if not isinstance(root, yaml.MappingNode):
        return None, [f"{path}:{root.start_mark.line + 1}:1: must be `key: value` lines"]
    values = reader.read_settings(root, known)
    return SettingsFile(path, values, reader.marks), reader.sorted_problems()


def _is_null(node: Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


class _Reader:
    """Turns nodes into a Tree, collecting marks and problems."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.marks: dict[tuple[Step, ...], tuple[int, int]] = {}
        self._problems: list[tuple[int, int, str]] = []

    def sorted_problems(self) -> list[str]:
        """One line each, from the top of the file down."""
        return [f"{self.path}:{line}:{column}: {text}" for line, column, text in sorted(self._problems)]

    def _complain(self, node: Node, text: str) -> None:
        self._problems.append((node.start_mark.line + 1, node.start_mark.column + 1, text))

    def read_settings(self, root: MappingNode, known: Collection[str]) -> dict[str, Tree]:
        values = {}
        for name, key, value in self._entries(root):
            if name not in known:
                self._complain(key, f"unknown key {name!r}{_suggest(name, known)}")
            elif not _is_null(value):
                values[name] = self._tree(value, (name,))
        return values

    def _entries(self, node: MappingNode) -> list[tuple[str, ScalarNode, Node]]:
        from yaml.nodes import ScalarNode

        found: dict[str, tuple[str, ScalarNode, Node]] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self._complain(key, "a key must be plain text")
            elif key.value in found:
                first = found[key.value][1].start_mark.line + 1
                self._complain(key, f"the key {key.value!r} stands in line {first} already")
            else:
                found[key.value] = (key.value, key, value)
        return list(found.values())

    def _tree(self, node: Node, path: tuple[Step, ...]) -> Tree:
        from yaml.nodes import MappingNode, ScalarNode, SequenceNode

        self.marks[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
        if len(path) > _DEEPEST:
            self._complain(node, "is nested too deeply")
            return ""
        if isinstance(node, MappingNode):
            return {name: self._tree(value, (*path, name)) for name, _, value in self._entries(node)}
        if isinstance(node, SequenceNode):
            return [self._tree(item, (*path, number)) for number, item in enumerate(node.value)]
        quoted = isinstance(node, ScalarNode) and node.style is not None
        return str(node.value) if quoted else Plain(node.value)


def _suggest(name: str, known: Collection[str]) -> str:
    from difflib import get_close_matches

    by_lower = {key.lower(): key for key in known}
    near = get_close_matches(name.lower().replace("-", "").replace("_", ""), by_lower, 1, 0.6)
    return f"; did you mean {by_lower[near[0]]}?" if near else ""

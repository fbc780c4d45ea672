"""Change a YAML document as text and keep every other byte: order, comments, quotes and line ends are its owner's.

PyYAML only tells where things are (a node's marks count characters); what is written is written here. Block style
(as kubectl writes it) and flow style (JSON) are both understood.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import yaml

# libyaml takes a tenth of the time; kubeconfigs of a hundred clusters exist. Its marks count characters too.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class CannotEditError(ValueError):
    """The document has a form that this does not change safely."""


@lru_cache(maxsize=4)
def load(text: str) -> dict[str, Any]:
    """The document; CannotEditError where it is not one mapping. Not to be changed: it is remembered."""
    try:
        document = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise CannotEditError(f"is not one YAML document ({str(error).splitlines()[0]})") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise CannotEditError("is not a mapping")
    return document


@lru_cache(maxsize=4)
def compose(text: str) -> yaml.MappingNode | None:
    """The root mapping; None where there is none yet. CannotEditError for anything else."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise CannotEditError(f"is not one YAML document ({str(error).splitlines()[0]})") from error
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == "tag:yaml.org,2002:null"):
        if root is not None and root.end_mark.index > root.start_mark.index:
            raise CannotEditError("says null where a mapping belongs")
        return None
    if not isinstance(root, yaml.MappingNode):
        raise CannotEditError("is not a mapping")
    return root


def find(root: yaml.MappingNode | None, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    """Key and value nodes."""
    for name, value in root.value if root is not None else ():
        if isinstance(name, yaml.ScalarNode) and name.value == key:
            return name, value
    return None


def get_scalar(text: str, key: str) -> tuple[str, str] | None:
    """Value and spelling of a scalar at the top level; None where the key is absent."""
    found = find(compose(text), key)
    if found is None:
        return None
    node = found[1]
    if not isinstance(node, yaml.ScalarNode) or node.style in ("|", ">"):
        raise CannotEditError(f"has a {key} that is not one value")
    spelled = text[node.start_mark.index:node.end_mark.index]
    return ("" if _is_null(node) else node.value), spelled


def set_scalar(text: str, key: str, spelled: str | None) -> str:
    """`key` at the top level as `spelled` says, or (None) taken out. Setting and taking out undo each other."""
    root = compose(text)
    found = find(root, key)
    if found is None:
        return text if spelled is None else add_key(text, key, spelled)
    if spelled is None:
        return remove_key(text, key)
    node = found[1]
    start, end = node.start_mark.index, node.end_mark.index
    if start == end:  # `key:` and nothing behind it
        return text[:start] + (f" {spelled}" if spelled else "") + text[end:]
    if not spelled and text[start - 1] == " ":
        start -= 1
    return text[:start] + spelled + text[end:]


def null_spelling(text: str, key: str) -> str | None:
    """How a key at the top level says that it has no value; None where it has one, or is absent."""
    found = find(compose(text), key)
    if found is None or not isinstance(found[1], yaml.ScalarNode) or not _is_null(found[1]):
        return None
    return text[found[1].start_mark.index:found[1].end_mark.index]


def set_empty(text: str, key: str, spelled: str | None) -> str:
    """A flow list that has nothing in it becomes what `null_spelling` found before, or (None) goes with its key."""
    found = find(compose(text), key)
    if found is None or not isinstance(found[1], yaml.SequenceNode) or found[1].value:
        return text
    if spelled is None:
        return remove_key(text, key)
    start, end = found[1].start_mark.index, found[1].end_mark.index
    return text[:start - (not spelled and text[start - 1] == " ")] + spelled + text[end:]


def add_item(text: str, key: str, item: Mapping[str, Any]) -> str:
    """`item` appended to the list at `key`, which is made where it is missing."""
    root = compose(text)
    found = find(root, key)
    if found is None:
        if root is not None and root.flow_style:
            return add_key(text, key, json.dumps([item]))
        column = 0 if root is None else root.start_mark.column
        return add_key(text, key, "", below=_block_item(item, column, line_end(text)))
    node = found[1]
    if isinstance(node, yaml.ScalarNode) and _is_null(node):
        start, end = node.start_mark.index, node.end_mark.index
        return text[:start] + (" " if start == end else "") + json.dumps([item]) + text[end:]
    if not isinstance(node, yaml.SequenceNode):
        raise CannotEditError(f"has a {key} that is not a list")
    if node.flow_style:
        if not node.value:
            at = node.start_mark.index + 1
            return text[:at] + json.dumps(item) + text[at:]
        at = node.value[-1].end_mark.index
        return f"{text[:at]}, {json.dumps(item)}{text[at:]}"
    at = _end_of_line(text, _end(text, node))
    eol = line_end(text)
    return text[:at] + eol + _block_item(item, node.start_mark.column, eol) + text[at:]


def remove_item(text: str, key: str, number: int) -> str:
    """The list at `key` without its item `number`; a block list that had no other goes with its key."""
    found = find(compose(text), key)
    if found is None or not isinstance(found[1], yaml.SequenceNode):
        raise CannotEditError(f"has no list of {key}")
    items = found[1].value
    if found[1].flow_style:
        return _cut_flow(text, [(item.start_mark.index, item.end_mark.index) for item in items], number)
    if len(items) == 1:
        return remove_key(text, key)
    item = items[number]
    dash = text.rfind("-", 0, item.start_mark.index)
    start = text.rfind("\n", 0, dash) + 1
    if text[start:dash].strip() or text[dash + 1:item.start_mark.index].strip():
        raise CannotEditError(f"has an entry of {key} beside other things in its line")
    return _cut_lines(text, start, _end_of_line(text, _end(text, item)))


def add_key(text: str, key: str, spelled: str, *, below: str = "") -> str:
    """A key that is not there yet, with its value on its line, or `below` it."""
    root = compose(text)
    eol = line_end(text)
    if root is not None and root.flow_style:
        name = json.dumps(key)
        if not root.value:
            at = root.start_mark.index + 1
            return f"{text[:at]}{name}: {spelled}{text[at:]}"
        at = root.value[-1][1].end_mark.index
        return f"{text[:at]}, {name}: {spelled}{text[at:]}"
    line = f"{key}:" + (f" {spelled}" if spelled else "") + (eol + below if below else "")
    if root is None:
        between = "" if not text or text.endswith("\n") else eol
        return text + between + line + eol
    at = _end_of_line(text, _end(text, root))
    return text[:at] + eol + " " * root.start_mark.column + line + text[at:]


def remove_key(text: str, key: str) -> str:
    root = compose(text)
    found = find(root, key)
    if root is None or found is None:
        return text
    if root.flow_style:
        spans = [(name.start_mark.index, value.end_mark.index) for name, value in root.value]
        return _cut_flow(text, spans, [name.value for name, _ in root.value].index(key))
    name, value = found
    start = name.start_mark.index - name.start_mark.column
    if text[start:name.start_mark.index].strip():
        raise CannotEditError(f"has {key} beside other things in its line")
    return _cut_lines(text, start, _end_of_line(text, max(_end(text, value), name.end_mark.index)))


def line_end(text: str) -> str:
    first = text.find("\n")
    return "\r\n" if first > 0 and text[first - 1] == "\r" else "\n"


def _block_item(item: Mapping[str, Any], column: int, eol: str) -> str:
    """As kubectl writes it, without a line end behind it."""
    lines = yaml.safe_dump([dict(item)], default_flow_style=False, width=1 << 30, allow_unicode=True).splitlines()
    return eol.join(" " * column + line for line in lines)


def _cut_flow(text: str, spans: list[tuple[int, int]], number: int) -> str:
    start, end = spans[number]
    if number:
        start = spans[number - 1][1]
    elif len(spans) > 1:
        end = spans[1][0]
    return text[:start] + text[end:]


def _cut_lines(text: str, start: int, end: int) -> str:
    """Whole lines taken out; `end` is before the last one's line end."""
    if start == 0:
        after = text.find("\n", end)
        return "" if after < 0 else text[after + 1:]
    before = start - 2 if text[start - 2:start] == "\r\n" else start - 1
    return text[:before] + text[end:]


def _end(text: str, node: yaml.Node) -> int:
    """Where the last thing in `node` ends; a block collection's own mark is behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return max(_end(text, part) for part in last) if isinstance(last, tuple) else _end(text, last)
    at = node.end_mark.index
    if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">"):
        while at and text[at - 1] in "\r\n":
            at -= 1
    return int(at)


def _end_of_line(text: str, at: int) -> int:
    end = text.find("\n", at)
    if end < 0:
        return len(text)
    return end - 1 if end > at and text[end - 1] == "\r" else end


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")

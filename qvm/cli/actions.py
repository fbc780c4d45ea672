"""Verbs that show something, and add to it and remove from it: `qvm ports dev add 8080:80`."""

from __future__ import annotations

from qvm.cli.invocation import Invocation
from qvm.errors import UsageError

ACTIONS = {"add": "add", "rm": "rm", "remove": "rm", "delete": "rm"}
"""Words for them -> `add` or `rm`."""


def split_action(
    invocation: Invocation, words: tuple[str, ...], *, verb: str, thing: str, example: str, does: str
) -> tuple[str | None, tuple[str, ...]]:
    """The action and what it is to be done to; a word before it is the profile's name.

    `thing`, `example`, `does`: what a user is told who left it out or forgot `add`. Raises UsageError.
    """
    at = next((number for number, word in enumerate(words[:2]) if word in ACTIONS), None)
    names = words[:1] if at is None else words[:at]
    invocation.name(names[0] if names else None)
    if at is None:
        if len(words) > 1:
            raise UsageError(f"what is {words[1]!r}?", hint=f"`qvm {verb} add {words[1]} -p {words[0]}` {does}")
        return None, ()
    if len(words) == at + 1:
        raise UsageError(f"a {thing} is missing", hint=f"qvm {verb} {words[at]} {example}")
    return ACTIONS[words[at]], words[at + 1 :]

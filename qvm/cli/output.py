"""The one place where results and errors become text or JSON.

JSON is an envelope on standard output, `{"ok": true, "result": ...}` or
`{"ok": false, "error": {code, message, hint, details, log_path}}`. Text errors go to standard error.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, TypeVar

import click

from qvm.cli.invocation import Invocation
from qvm.errors import QvmError

T = TypeVar("T")


def emit(invocation: Invocation, result: T, render: Callable[[T], str], *, essential: bool = True) -> None:
    """Show a result; text that is not `essential` (the news of a start, say) falls silent under -q."""
    if invocation.json:
        click.echo(to_json({"ok": True, "result": to_plain(result)}))
    elif essential or not invocation.quiet:
        text = render(result)
        if text:
            click.echo(text)


def to_plain(value: Any) -> Any:
    """JSON-ready form of results: dataclasses become objects, paths become text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    return value


def to_json(document: Any) -> str:
    import json

    return json.dumps(document, indent=2, ensure_ascii=False)


def error_envelope(error: QvmError) -> dict[str, Any]:
    """What `--json` says of an error."""
    data = error.to_dict()
    data.pop("exit_code", None)  # the process's own exit code says it
    return {"ok": False, "error": data}


def report_error(error: QvmError, *, json: bool) -> int:
    """Show an error; returns the exit code that goes with it."""
    if json:
        click.echo(to_json(error_envelope(error)))
    else:
        click.echo(render_error(error), err=True)
    return error.exit_code


def render_error(error: QvmError) -> str:
    lines = [f"qvm: {error.message}"]
    if error.details:
        lines += [f"    {line}" for line in error.details.splitlines()]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    if error.log_path:
        lines.append(f"log: {error.log_path}")
    return "\n".join(lines)


def report_interrupt() -> None:
    # The terminal has just shown ^C: over it, not behind it.
    start = "\r" if sys.stderr.isatty() else ""
    click.echo(f"{start}qvm: interrupted", err=True)


def report_bug(error: Exception, *, json: bool, verbose: bool) -> int:
    """Show an error nobody raised on purpose, with its traceback where asked for (-v)."""
    import traceback

    trace = "".join(traceback.format_exception(error))
    bug = QvmError(
        f"{type(error).__name__}: {error}",
        hint="this is a bug in qvm; please report it with the output of the same command with -v",
        details=trace.rstrip() if verbose or json else None,
    )
    return report_error(bug, json=json)

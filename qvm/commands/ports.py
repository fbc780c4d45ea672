"""`qvm ports`: what is forwarded, and rules added and removed while the VM runs (or for its next start)."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qvm.config.context import Context, RejectedError
from qvm.config.ports import PortForward, find_earlier, parse_rule, validate_rules
from qvm.config.save import save_setting
from qvm.errors import ConfigError, InstanceStateError, UsageError
from qvm.filenames import Files
from qvm.instance.record import Record
from qvm.instance.store import find_run, load_record, lock_instance, save_record
from qvm.supervisor.client import NoSupervisorError, call

SETTLE = 1.0
"""Seconds in which a new rule's forward should be open; QEMU answers in milliseconds."""


@dataclass(frozen=True, slots=True)
class PortsResult:
    profile: str
    rules: list[str]
    """In force, first match wins."""
    forwards: list[dict[str, Any]]
    """As in `status`, and rules that wait for a listener (state `waiting`)."""
    notes: list[str]


def ports(profile: str) -> PortsResult:
    """What is forwarded now; nothing of a VM that does not run."""
    record = load_record(profile)
    try:
        answer = call(Files(profile).control_socket, "ports")
    except NoSupervisorError:
        forwards = _with_waiting(record, [], reason=f"{profile} does not run")
        return PortsResult(profile, _texts(record), forwards, [])
    except InstanceStateError as error:  # it is starting
        return PortsResult(profile, _texts(record), _with_waiting(record, [], reason=error.message), [])
    return PortsResult(profile, _texts(record), _with_waiting(record, answer["forwards"]), [])


def add_rules(profile: str, texts: Sequence[str], *, save: bool = True, cwd: Path) -> PortsResult:
    """Put rules before those there are: they win. In the record, in the running VM and, with `save`, in the profile.

    ConfigError for what is wrong with them; a rule that is there already is moved to the front.
    """
    context = Context(profile, cwd, os.environ)
    new = [_parse(text, context) for text in texts]

    def change(rules: tuple[PortForward, ...]) -> tuple[PortForward, ...]:
        changed = (*new, *(rule for rule in rules if rule not in new))
        problems = validate_rules(changed, context)
        if problems:
            raise ConfigError([problem.text for problem in problems])
        return changed

    return _change(profile, change, save=save)


def remove_rules(profile: str, texts: Sequence[str], *, save: bool = True, cwd: Path) -> PortsResult:
    """Take rules away. UsageError where there is no such rule."""
    context = Context(profile, cwd, os.environ)
    old = [_parse(text, context) for text in texts]

    def change(rules: tuple[PortForward, ...]) -> tuple[PortForward, ...]:
        for rule in old:
            if rule not in rules:
                known = ", ".join(str(each) for each in rules)
                raise UsageError(f"there is no rule {rule}", hint=f"there are: {known}" if known else "there are none; "
                                 f"`qvm ports add ignore:{rule.guest}` keeps a port of the VM from being forwarded")
        return tuple(rule for rule in rules if rule not in old)

    return _change(profile, change, save=save)


def _parse(text: str, context: Context) -> PortForward:
    try:
        return parse_rule(text, context)
    except RejectedError as error:
        raise ConfigError([problem.text for problem in error.problems], hint="qvm ports add 8080:80") from error


def _change(profile: str, change: Any, *, save: bool) -> PortsResult:
    with lock_instance(profile):
        record = load_record(profile)
        rules = change(record.config.port_forwards)
        record = replace(record, config=replace(record.config, port_forwards=rules))
        save_record(record)
        notes = save_setting(profile, "portForwards", rules) if save else []
        if find_run(profile) is None:
            forwards = _with_waiting(record, [], reason=f"{profile} does not run")
            return PortsResult(profile, _texts(record), forwards, notes)
        try:
            forwards = _with_waiting(record, _apply(profile, [str(rule) for rule in rules]))
        except InstanceStateError as error:
            forwards = _with_waiting(record, [], reason=error.message)
            notes.append("the rules are in force from the next start on")
    return PortsResult(profile, _texts(record), forwards, notes)


def _apply(profile: str, rules: list[str]) -> list[dict[str, Any]]:
    socket = Files(profile).control_socket
    answer = call(socket, "ports", rules=rules)
    end = time.monotonic() + SETTLE
    while any(entry["state"] == "opening" for entry in answer["forwards"]) and time.monotonic() < end:
        time.sleep(0.01)
        answer = call(socket, "ports")
    return list(answer["forwards"])


def _texts(record: Record) -> list[str]:
    return [str(rule) for rule in record.config.port_forwards]


def _with_waiting(
    record: Record, forwards: list[dict[str, Any]], *, reason: str = "nothing listens there in the VM"
) -> list[dict[str, Any]]:
    """The forwards, and a row for each rule that has none, with the reason."""
    served = {entry.get("rule") for entry in forwards}
    rules = record.config.port_forwards
    waiting = []
    for rule in rules:
        if rule.host is not None and str(rule) not in served:
            earlier = find_earlier(rules, rule)
            waiting.append({
                "protocol": rule.protocol, "guest": str(rule.guest), "host": str(rule.host), "port": None, "path": None,
                "state": "waiting", "reason": f"{earlier} comes first" if earlier else reason, "rule": str(rule),
            })  # fmt: skip
    return [*forwards, *waiting]

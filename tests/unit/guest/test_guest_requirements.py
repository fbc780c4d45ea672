from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from qvm.errors import GuestError, NotReadyError
from qvm.guest.requirements import Requirement, wait_until_ready


def after(seconds: float, log: list[str] | None = None, name: str = "") -> Callable[[], Awaitable[None]]:
    async def check() -> None:
        await asyncio.sleep(seconds)
        if log is not None:
            log.append(name)

    return check


def test_independent_ones_run_at_the_same_time_and_order_is_kept() -> None:
    log: list[str] = []
    events: list[tuple[str, str]] = []
    seconds = asyncio.run(wait_until_ready([
        Requirement("runtime", 5, "", after(0.0, log, "runtime"), after=("agent", "mounts")),
        Requirement("ssh", 5, "", after(0.15, log, "ssh")),
        Requirement("agent", 5, "", after(0.05, log, "agent")),
        Requirement("mounts", 5, "", after(0.05, log, "mounts"), after=("agent",)),
    ], lambda name, state, _seconds: events.append((name, state))))
    assert log == ["agent", "mounts", "runtime", "ssh"]
    assert set(seconds) == set(log) and 0.1 < seconds["ssh"] < 0.5
    assert events.index(("agent", "done")) < events.index(("mounts", "started"))
    assert [state for name, state in events if name == "ssh"] == ["started", "done"]


def test_a_late_one_is_named_with_its_hint_and_ends_the_others() -> None:
    events: list[tuple[str, str]] = []
    log: list[str] = []
    with pytest.raises(NotReadyError) as failed:
        asyncio.run(wait_until_ready([
            Requirement("agent", 0.05, "look at the console", after(9)),
            Requirement("ssh", 5, "", after(0.3, log, "ssh")),
            Requirement("runtime", 5, "", after(0.0, log, "runtime"), after=("agent",)),
        ], lambda name, state, _seconds: events.append((name, state))))
    assert failed.value.requirement == "agent"
    assert failed.value.hint == "look at the console" and "0.05 s" in failed.value.message
    assert ("agent", "failed") in events and log == []
    assert not any(name == "runtime" for name, _ in events)


def test_the_deadline_counts_from_when_it_may_begin() -> None:
    asyncio.run(wait_until_ready([
        Requirement("slow", 5, "", after(0.2)),
        Requirement("then", 0.1, "", after(0.0), after=("slow",)),
    ]))


def test_errors_of_a_check_keep_their_words() -> None:
    async def refuse() -> None:
        raise GuestError("docker said no", details="line 1", hint=None)

    with pytest.raises(NotReadyError) as failed:
        asyncio.run(wait_until_ready([Requirement("runtime", 5, "see the journal", refuse)]))
    assert failed.value.message == "runtime: docker said no"
    assert (failed.value.details, failed.value.hint) == ("line 1", "see the journal")


def test_a_defect_in_a_check_is_not_dressed_up() -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(wait_until_ready([Requirement("x", 5, "", broken)]))


def test_a_timeout_inside_a_check_is_no_missed_deadline() -> None:
    async def inner() -> None:
        raise TimeoutError

    with pytest.raises(NotReadyError, match="timed out"):
        asyncio.run(wait_until_ready([Requirement("x", 5, "", inner)]))


@pytest.mark.parametrize("afters", [{"a": ("b",), "b": ("a",)}, {"a": ("nobody",)}, {"a": ("a",)}])
def test_impossible_orders_are_refused(afters: dict[str, tuple[str, ...]]) -> None:
    wanted = [Requirement(name, 1, "", after(0), after=first) for name, first in afters.items()]
    with pytest.raises(ValueError, match="never begin"):
        asyncio.run(wait_until_ready(wanted))


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        asyncio.run(wait_until_ready([Requirement("a", 1, "", after(0)), Requirement("a", 1, "", after(0))]))

"""Deadlines and the polling loop."""

from __future__ import annotations

import itertools
import time

import pytest

from qvm.errors import DeadlineError
from qvm.wait import Deadline, backoff, wait_until


def test_pauses_grow_from_5_ms_to_a_limit() -> None:
    pauses = list(itertools.islice(backoff(), 20))
    assert pauses[0] == 0.005
    assert pauses == sorted(pauses)
    assert pauses[-1] == 0.5


def test_the_first_result_counts_even_where_it_is_falsy() -> None:
    answers = iter([None, False, 0])
    assert wait_until(lambda: next(answers), Deadline(5)) == 0


def test_a_deadline_names_what_took_too_long() -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineError, match=r"the kettle took longer than 0\.05 s"):
        wait_until(lambda: None, Deadline(0.05, "the kettle"))
    assert time.monotonic() - began < 1


def test_a_passed_deadline() -> None:
    deadline = Deadline(0)
    assert deadline.passed
    assert deadline.left == 0
    with pytest.raises(DeadlineError):
        deadline.check()
    assert not Deadline(60).passed

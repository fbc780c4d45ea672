"""Progress on pipes and on terminals."""

from __future__ import annotations

import io

import pytest

from qvm.cli import progress
from qvm.cli.progress import PlainProgress, TerminalProgress, open_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines() -> None:
    stream = io.StringIO()
    plain = PlainProgress(stream)
    with plain.step("building", total=10, unit="B") as step:
        step.update(5)
        step.detail("kernel")
    with pytest.raises(ValueError), plain.step("breaking"):
        raise ValueError
    plain.milestone("agent", "waiting", 0.0)
    plain.milestone("agent", "done", 2.0)
    plain.milestone("ssh", "failed", 3.0)
    plain.note("careful")
    lines = stream.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines] == ["building", "breaking", "agent", "ssh", "note"]
    assert lines[2:] == ["agent: done in 2.0 s", "ssh: failed after 3.0 s", "note: careful"]


def test_long_plain_steps_show_life(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with PlainProgress(stream).step("fetching", total=200, unit="B") as step:
        for second in range(30):
            now[0] = float(second)
            step.update(second)
    assert stream.getvalue().splitlines() == [
        "fetching ... 2 % of 200 B", "fetching ... 7 % of 200 B", "fetching ... 12 % of 200 B",
        "fetching: done in 29.0 s",
    ]  # fmt: skip


def test_a_terminal_gets_bars_and_a_line_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with open_progress(stream) as shown:
        assert isinstance(shown, TerminalProgress)
        with shown.step("building [x]", total=10) as step:
            step.update(5)
            step.update(6, 12)
            step.detail("kernel [y]")
            with shown.step("inner"):
                pass
        shown.milestone("agent", "waiting", 0.0)
        shown.milestone("agent", "done", 1.0)
        shown.milestone("ssh", "waiting", 0.0)
        shown.note("careful [z]")
    text = stream.getvalue()
    for words in ("building [x]", "inner", "agent", "careful [z]"):
        assert words in text
    assert shown._bars is None


def test_dumb_terminals_get_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with open_progress(Terminal()) as shown:
        assert isinstance(shown, PlainProgress)


def test_terminals_of_another_alphabet_get_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    raw = io.BytesIO()

    class Latin(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    stream = Latin(raw, encoding="latin-1")
    with open_progress(stream) as shown, shown.step("building"):
        pass
    stream.flush()
    assert raw.getvalue().startswith(b"building: done in ")


def test_shares() -> None:
    assert progress._share(512, 1024, "B") == "50 % of 1 KiB"
    assert progress._share(1, 4, "") == "25 %"
    assert progress._share(7, None, "files") == "7 files"

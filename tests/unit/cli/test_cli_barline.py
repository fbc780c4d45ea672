"""The line of a step under way, on wide and narrow terminals."""

from __future__ import annotations

import pytest

from qvm.cli.barline import Line, fit_line, shorten

LINE = Line("installing Debian trixie for x86_64", 65.0, "26 %", 0.26, "unpacking libpython3.13-minimal")


def text(line: Line, width: int, name_width: int = 0) -> str:
    return "".join(piece for piece, _ in fit_line(line, width, name_width=name_width))


def bar(done: int, width: int) -> str:
    return "━" * done + "─" * (width - done)


@pytest.mark.parametrize("width", range(12, 140))
def test_never_wider_than_the_terminal(width: int) -> None:
    assert len(text(LINE, width)) <= width
    assert len(text(LINE, width, name_width=60)) <= width


def test_what_matters_least_goes_first() -> None:
    name, clock = "installing Debian trixie for x86_64", "  0:01:05"
    assert text(LINE, 120)[1:] == f" {name}  {bar(6, 24)}  26 %{clock}  unpacking libpython3.13-minimal"
    assert text(LINE, 90)[1:] == f" {name}  {bar(6, 24)}  26 %{clock}  unpacking…"
    assert text(LINE, 66)[1:] == f" {name}  {bar(3, 12)}  26 %{clock}"
    assert text(LINE, 59)[1:] == f" {name}  26 %{clock}"
    assert text(LINE, 50)[1:] == f" installing Debian trixie for x86…  26 %{clock}"
    assert text(LINE, 30)[1:] == f" installing Debian …{clock}"


def test_the_size_of_the_whole_gives_way_to_the_name() -> None:
    line = Line("downloading debian-13-genericcloud-amd64.qcow2", 5.0, "50 % of 381.5 MiB", 0.5)
    assert text(line, 99)[1:] == f" {line.name}  {bar(10, 21)}  50 % of 381.5 MiB  0:00:05"
    assert text(line, 70)[1:] == f" {line.name}  50 %  0:00:05"
    assert text(line, 59)[1:] == " downloading debian-13-genericcloud-amd64.…  50 %  0:00:05"


def test_a_step_of_unknown_size_has_no_bar() -> None:
    assert text(Line("agent", 3.2), 80)[1:] == " agent  0:00:03"
    assert text(Line("agent", 3.2, detail="waiting"), 80)[1:] == " agent  0:00:03  waiting"


def test_names_are_aligned() -> None:
    assert text(Line("ssh", 3700.0), 80, name_width=7)[1:] == " ssh      1:01:40"


def test_the_bar_fills_and_never_overflows() -> None:
    def filled(fraction: float) -> int:
        return next(len(piece) for piece, style in fit_line(Line("x", 0, "", fraction), 80) if style == "magenta")

    assert [filled(fraction) for fraction in (-1.0, 0.0, 0.5, 1.0, 1.5)] == [0, 0, 12, 24, 24]


def test_shorten() -> None:
    assert [shorten("abcdef", width) for width in (6, 5, 1)] == ["abcdef", "abcd…", "…"]

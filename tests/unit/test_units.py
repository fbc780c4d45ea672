"""Sizes and durations as people write and read them."""

from __future__ import annotations

import pytest

from qvm.units import GiB, KiB, MiB, TiB, format_duration, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4", 4 * GiB), (4, 4 * GiB), (1.5, 1536 * MiB), ("4GiB", 4 * GiB), ("4 gb", 4 * GiB), ("512MiB", 512 * MiB),
        ("512m", 512 * MiB), ("1T", TiB), ("10k", 10 * KiB), ("7b", 7), (" 2 ", 2 * GiB), ("0", 0),
    ],
)  # fmt: skip
def test_sizes(text: str | int | float, size: int) -> None:
    assert parse_size(text) == size


def test_a_bare_number_counts_the_default_unit() -> None:
    assert parse_size("3", default_unit="MiB") == 3 * MiB


@pytest.mark.parametrize("text", ["", "-1", "GiB", "1e3", "1,5", "4 GiB x", "nan", "inf", "٤x"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a size|unknown unit"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (KiB, "1 KiB"), (1536, "1.5 KiB"), (4 * GiB, "4 GiB"), (10 * TiB, "10 TiB"),
     (1.25 * TiB, "1.2 TiB")],
)  # fmt: skip
def test_format_size(size: float, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (0.8504, "850 ms"), (12.34, "12.3 s"), (245, "4 min 05 s"), (12000, "3 h 20 min")],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text

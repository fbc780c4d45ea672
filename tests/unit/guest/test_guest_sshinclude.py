"""The line in the user's own SSH configuration: nothing else in it changes, whatever it holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvm.guest.sshinclude import add_include, include_line, remove_include

BLOCKS = Path("/home/me/my vms/ssh_config")


@pytest.mark.parametrize("text", [
    b"", b"Host a\n  User b\n", b"Host a\r\n  User b", b"\xff\xfe not UTF-8 \x00\n\n\n",
    b'Include "/home/me/my vms/ssh_config2"\n', b"\nHost *\n\tForwardAgent no\n\n",
])
def test_the_line_comes_first_once_and_goes_without_a_trace(text: bytes) -> None:
    added = add_include(text, BLOCKS)
    assert added == include_line(BLOCKS) + text
    assert add_include(added, BLOCKS) == added
    assert remove_include(added, BLOCKS) == text == remove_include(text, BLOCKS)


def test_a_file_made_for_the_line_goes_unless_somebody_wrote_into_it() -> None:
    made = add_include(None, BLOCKS)
    assert remove_include(made, BLOCKS) is None
    kept = remove_include(made + b"Host a\n", BLOCKS)
    assert kept is not None and kept.endswith(b"needs it no more, unless something else is written into it.\nHost a\n")


def test_the_line_stays_where_the_user_has_moved_it() -> None:
    moved = b"Host a\n" + include_line(BLOCKS) + b"Host b\n"
    assert add_include(moved, BLOCKS) == moved
    assert remove_include(moved, BLOCKS) == b"Host a\nHost b\n"

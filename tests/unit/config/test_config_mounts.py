"""Mounts as typed and as written in the file."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from qvm.config.context import Context, RejectedError
from qvm.config.kinds import Mounts, show_mount
from qvm.config.model import Mount
from qvm.config.validate import find_target_problem, validate_mounts


@pytest.fixture
def context(tmp_path: Path) -> Context:
    for name in ("my proj", "köln", "src"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    return Context("dev", tmp_path, {"HOME": str(tmp_path)})


def parse(context: Context, *items: Any) -> tuple[Mount, ...]:
    return Mounts().parse(list(items), context)


@pytest.mark.parametrize(
    ("text", "source", "target", "writable"),
    [
        ("src", "src", None, True),
        ("./src", "src", None, True),
        ("src:ro", "src", None, False),
        ("src:w", "src", None, True),
        ("src:rw", "src", None, True),
        ("src:/dst", "src", "/dst", True),
        ("src:/dst:ro", "src", "/dst", False),
        ("src:/dst:w", "src", "/dst", True),
        ("my proj:/a b:ro", "my proj", "/a b", False),
        ("~/köln", "köln", None, True),
        ("src/../src", "src", None, True),
        ("src://dst", "src", "/dst", True),
    ],
)
def test_flag_forms(
    context: Context, text: str, source: str, target: str | None, writable: bool
) -> None:
    path = context.cwd / source
    assert parse(context, text) == (Mount(path, PurePosixPath(target or path), writable),)


def test_file_forms(context: Context) -> None:
    found = parse(
        context,
        {"source": "~/src"},
        {"source": "a:b", "target": "/colon", "writable": "no"},
    )
    assert found == (
        Mount(context.cwd / "src", PurePosixPath(context.cwd / "src")),
        Mount(context.cwd / "a:b", PurePosixPath("/colon"), writable=False),
    )
    assert Mounts().parse(Mounts().dump(found), context) == found
    assert Mounts().restore([mount.to_dict() for mount in found]) == found


def test_none_is_no_mount_and_stands_alone(context: Context) -> None:
    assert parse(context, "none") == ()
    assert Mounts().parse("none", context) == ()
    assert Mounts().parse(Mounts().dump(()), context) == ()
    with pytest.raises(RejectedError, match="cannot stand beside others"):
        parse(context, "none", "src")


@pytest.mark.parametrize(
    "text", ["a:/b:/c", "a:/b:x", "a:b", ":", "", "a::ro", {"target": "/x"}, {"source": "s", "ro": "y"}]
)
def test_unreadable(context: Context, text: Any) -> None:
    with pytest.raises(RejectedError) as caught:
        parse(context, text)
    assert caught.value.problems[0].path[0] == 0


def wrong(context: Context, *items: Any) -> list[str]:
    return [problem.text for problem in validate_mounts(parse(context, *items), context)]


def test_sources_must_be_folders(context: Context) -> None:
    assert wrong(context, "src", "my proj") == []
    assert wrong(context, "nowhere") == [f"{context.cwd}/nowhere does not exist"]
    assert wrong(context, "file") == [f"{context.cwd}/file is a file; only folders can be mounted"]


def test_a_target_is_used_once(context: Context) -> None:
    [problem] = wrong(context, "src:/x", "köln:/x")
    assert problem == f"/x is the target of {context.cwd}/src and {context.cwd}/köln"
    assert wrong(context, "src:/x", "src:/y", "köln:/x/below") == []


@pytest.mark.parametrize(
    "target",
    ["/", "/etc", "/usr", "/usr/bin", "/lib64", "/var", "/var/lib", "/run", "/boot", "/tmp", "/proc/x", "/sys/a/b",
     "/dev/shm", "/home/../etc"],
)
def test_targets_that_belong_to_the_guest(target: str) -> None:
    assert find_target_problem(PurePosixPath(target)) is not None


@pytest.mark.parametrize(
    "target", ["/app", "/home/me", "/root", "/usr/local/src", "/var/lib/x", "/tmp/x", "/srv", "/etcetera"]
)
def test_targets_that_are_fine(target: str) -> None:
    assert find_target_problem(PurePosixPath(target)) is None


def test_shown_as_typed() -> None:
    assert show_mount(Mount(Path("/a"), PurePosixPath("/a"))) == "/a"
    assert show_mount(Mount(Path("/a"), PurePosixPath("/b"), writable=False)) == "/a:/b:ro"


def test_mapping_for_writing_is_for_who_asks(context: Context, tmp_path: Path) -> None:
    plain, asked, both, mapped = parse(
        context, str(tmp_path), f"{tmp_path}:mmap", f"{tmp_path}:/x:ro:mmap", {"source": str(tmp_path), "mmap": "yes"}
    )
    assert [mount.mmap for mount in (plain, asked, both, mapped)] == [False, True, True, True]
    assert (str(both.target), both.writable, show_mount(both)) == ("/x", False, f"{tmp_path}:/x:ro:mmap")
    assert "mmap" not in plain.to_dict() and Mount.from_dict(asked.to_dict()) == asked

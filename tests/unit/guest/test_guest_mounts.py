from __future__ import annotations

import asyncio
from pathlib import Path, PurePosixPath

from qvm.config.model import Mount
from qvm.guest.mounts import ensure_mounts, order_mounts

MOUNTS = (
    Mount(Path("/a/b c"), PurePosixPath("/a/b c"), writable=False),
    Mount(Path("/a"), PurePosixPath("/a")),
    Mount(Path("/z"), PurePosixPath("/z")),
)


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str, bool]] = []

    async def mount(self, tag: str, target: str | PurePosixPath, *, readonly: bool = False) -> bool:
        self.calls.append((tag, str(target), readonly))
        return str(target) != "/z"


def test_outer_folders_come_first_and_tags_follow_the_list() -> None:
    assert [(mount.tag, str(mount.target)) for mount in order_mounts(MOUNTS)] == [
        ("qvm1", "/a"), ("qvm2", "/z"), ("qvm0", "/a/b c")]


def test_ensure_mounts_tells_what_was_missing() -> None:
    recorder = Recorder()
    missing = asyncio.run(ensure_mounts(recorder, MOUNTS))
    assert missing == [PurePosixPath("/a"), PurePosixPath("/a/b c")]
    assert recorder.calls == [("qvm1", "/a", False), ("qvm2", "/z", False), ("qvm0", "/a/b c", True)]

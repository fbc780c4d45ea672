from __future__ import annotations

import asyncio
from pathlib import Path, PurePosixPath

from qvm.config.model import Mount
from qvm.guest.mounts import ensure_mounts, order_mounts
from qvm.instance.mounted import plan_mounts

MOUNTS = plan_mounts((
    Mount(Path("/a/b c"), PurePosixPath("/a/b c"), writable=False),
    Mount(Path("/a"), PurePosixPath("/a")),
    Mount(Path("/z"), PurePosixPath("/z")),
), 2)


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple[str, str, bool]] = []

    async def mount(
        self, tag: str, target: str | PurePosixPath, *, readonly: bool = False, mmap: bool = False
    ) -> bool:
        self.calls.append((tag, str(target), readonly))
        return str(target) != "/z"


def test_outer_folders_come_first_and_what_has_no_slot_is_plugged_in() -> None:
    assert [(each.tag, str(each.mount.target)) for each in order_mounts(MOUNTS)] == [
        ("qvm1", "/a"), ("qvmplug0", "/z"), ("qvm0", "/a/b c")]


def test_ensure_mounts_tells_what_was_missing() -> None:
    recorder = Recorder()
    missing = asyncio.run(ensure_mounts(recorder, MOUNTS))
    assert missing == [PurePosixPath("/a"), PurePosixPath("/a/b c")]
    assert recorder.calls == [("qvm1", "/a", False), ("qvmplug0", "/z", False), ("qvm0", "/a/b c", True)]

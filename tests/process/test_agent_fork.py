"""A fork's document across the real channel, applied to a scratch root."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent_process import drive, running

from qvm.errors import GuestError
from qvm.seed.data import SeedData
from qvm.seed.render import fork_document

DATA = SeedData(
    instance_id="one", hostname="dev", user="root", uid=0, gid=0, home="/root", shell="/bin/sh", authorized_keys=(),
    host_key="", host_key_public="", env={"WORD": "fork"},
)


def test_a_fork_is_personalised_in_one_message(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/machine-id").write_text("\n")

    async def work() -> None:
        async with running(tmp_path, "--seed", "none", "--root", str(root)) as (_, channel):
            document = fork_document(DATA)
            document["fork"]["clock_ns"] = 0
            state = await channel.personalise(document)
            assert (state.state, state.errors, state.stale) == ("applied", (), ())
            assert (await channel.wait_for_seed()).timings == state.timings
            assert channel.stale_ids == ()
            assert document["fork"]["clock_ns"] == 0, "the caller's document is left alone"
            assert (root / "etc/machine-id").read_text().strip() == document["fork"]["machine_id"]
            assert (await channel.exec(["sh", "-c", "echo $WORD"])).stdout == b"fork\n"
            await channel.hello()
            assert channel.greeting is not None and channel.greeting.seed.state == "applied"

    drive(work)


def test_tracking_an_id_that_is_not_there_finds_nothing(tmp_path: Path) -> None:
    (tmp_path / "no-id").write_text("not an id\n")

    async def work() -> None:
        async with running(tmp_path) as (_, channel):
            assert await channel.track_id("x", file=str(tmp_path / "missing"), process="no-such-program") == 0
            assert await channel.track_id("x", file=str(tmp_path / "no-id"), process="no-such-program") == 0

    drive(work)


def test_nobody_holds_what_is_not_mounted(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path) as (_, channel):
            assert await channel.find_mount_users([tmp_path.as_posix()]) == ()
            with pytest.raises(GuestError):
                await channel.request("mount_users")

    drive(work)

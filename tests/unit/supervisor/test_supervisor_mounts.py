"""Host folders that come and go: what is unmounted, plugged, mounted, in which order, and what a failure leaves."""

from __future__ import annotations

import asyncio
from pathlib import Path, PurePosixPath

import pytest

from qvm.config.model import Mount
from qvm.errors import GuestError, InstanceStateError, QvmError, UsageError
from qvm.guest.protocol import MountUser
from qvm.instance.mounted import MountedFolder, plan_mounts
from qvm.qemu.plug import free_plug, point_link
from qvm.supervisor.mounts import Mounts, describe_mounts, plan_change


def mount(source: str, target: str | None = None, *, writable: bool = True) -> Mount:
    return Mount(Path(source), PurePosixPath(target or source), writable)


A, INNER, B = mount("/h/a", "/a"), mount("/h/inner", "/a/inner"), mount("/h/b", "/b")


class Guest:
    """A channel and the plugs of its machine; `calls` in order."""

    def __init__(self, *, users: tuple[MountUser, ...] = (), refuses: str = "") -> None:
        self.users, self.refuses = users, refuses
        self.calls: list[str] = []
        self.let_go: set[str] = set()
        """Devices that the guest has given back."""

    async def find_mount_users(self, targets: object) -> tuple[MountUser, ...]:
        return self.users

    async def umount(self, target: PurePosixPath, *, lazy: bool = False) -> bool:
        self.calls.append(f"umount {target}{' lazily' if lazy else ''}")
        return True

    async def mount(self, tag: str, target: PurePosixPath, *, readonly: bool = False, mmap: bool = False) -> bool:
        if str(target) == self.refuses:
            raise GuestError(f"{target}: No such device")
        self.calls.append(f"mount {tag} {target}{' ro' if readonly else ''}")
        return True

    async def plug(self, folder: MountedFolder) -> None:
        self.calls.append(f"plug {folder.device}")

    async def plug_missing(self, folders: list[MountedFolder]) -> None:
        for folder in folders:
            assert not folder.parked
            if folder.device in self.let_go:
                await self.plug(folder)

    async def unplug(self, folder: MountedFolder) -> None:
        self.calls.append(f"unplug {folder.device}")


def change(guest: Guest, now: tuple[MountedFolder, ...], *wanted: Mount, lazy: bool = False) -> Mounts:
    mounts = Mounts(guest, guest, now)  # type: ignore[arg-type]
    mounts.notes = asyncio.run(mounts.become(wanted, lazy=lazy))  # type: ignore[attr-defined]
    return mounts


def test_what_is_new_is_plugged_in_and_mounted() -> None:
    guest = Guest()
    mounts = change(guest, plan_mounts([A], 4), A, mount("/h/b", "/b", writable=False))
    assert guest.calls == ["plug plug0", "mount qvmplug0 /b ro"]
    assert [each.tag for each in mounts.folders] == ["qvm0", "qvmplug0"]


def test_what_is_inside_a_new_one_is_mounted_on_top_of_it_again() -> None:
    guest = Guest()
    change(guest, plan_mounts([INNER], 4), INNER, A)
    assert guest.calls == ["umount /a/inner", "plug plug0", "mount qvmplug0 /a", "mount qvm0 /a/inner"]


def test_what_is_inside_one_that_goes_stays() -> None:
    guest = Guest()
    mounts = change(guest, plan_mounts([INNER, A], 1), INNER)
    assert guest.calls == ["umount /a/inner", "umount /a", "mount qvm0 /a/inner", "unplug plug0"]
    assert [each.mount for each in mounts.folders] == [INNER]


def test_a_device_of_the_start_is_parked_and_serves_its_folder_again() -> None:
    guest = Guest()
    mounts = change(guest, plan_mounts([A, B], 4), B)
    assert guest.calls == ["umount /a"] and "until the next start" in mounts.notes[0]  # type: ignore[attr-defined]
    assert [each.parked for each in mounts.folders] == [True, False]
    assert [row["target"] for row in describe_mounts(mounts.folders)] == ["/b"]
    again = change(guest, mounts.folders, B, mount("/h/a", "/elsewhere"))
    assert guest.calls[1:] == ["mount qvm0 /elsewhere"]
    assert sorted((each.tag, each.parked) for each in again.folders) == [("qvm0", False), ("qvm1", False)]


def test_what_is_used_stays_unless_it_is_forced() -> None:
    users = (MountUser(7, "vim", "/a", "cwd", None),)
    guest = Guest(users=users)
    with pytest.raises(InstanceStateError, match=r"process 7 \(vim\) uses /a"):
        change(guest, plan_mounts([A], 0))
    assert guest.calls == []
    mounts = change(guest, plan_mounts([A], 0), lazy=True)
    # Its device stays: the guest's driver would wait for the last user.
    assert guest.calls == ["umount /a lazily"] and mounts.folders[0].parked
    # The guest has let go since, and the folder is wanted again.
    guest.let_go = {mounts.folders[0].device}
    again = change(guest, mounts.folders, A)
    assert guest.calls[1:] == [f"plug {again.folders[0].device}", f"mount {again.folders[0].tag} /a"]


def test_a_guest_that_refuses_gets_back_what_it_had() -> None:
    guest = Guest(refuses="/b")
    with pytest.raises(QvmError, match="No such device"):
        change(guest, plan_mounts([INNER], 4), INNER, A, B)
    assert guest.calls[-5:] == ["umount /b", "unplug plug1", "umount /a", "unplug plug0", "mount qvm0 /a/inner"]


def test_nothing_changes_where_nothing_differs() -> None:
    guest = Guest()
    change(guest, plan_mounts([A, INNER], 4), A, INNER)
    assert guest.calls == []
    assert plan_change(plan_mounts([A, INNER], 4), [INNER, A]).moved == ()


def test_a_source_that_has_gone_shows(tmp_path: Path) -> None:
    here, gone = Mount(tmp_path, PurePosixPath("/here")), Mount(tmp_path / "gone", PurePosixPath("/gone"))
    rows = describe_mounts(plan_mounts([here, gone], 4))
    assert [row["state"] for row in rows] == ["mounted", "broken"] and "does not exist" in rows[1]["reason"]


def test_there_is_an_end_to_plugging() -> None:
    with pytest.raises(UsageError, match="at most 7"):
        free_plug(plan_mounts([A] * 7, 0))


def test_the_link_is_switched_in_one_step(tmp_path: Path) -> None:
    link = tmp_path / "plug"
    for name in ("one", "two"):
        point_link(link, tmp_path / name)
        assert link.readlink() == tmp_path / name
    assert [path.name for path in tmp_path.iterdir()] == ["plug"]

"""mountInotify: what changes in mounted host folders is replayed in the guest, so that watchers there notice.

The host's side is `watchdog` (inotify, FSEvents). The guest's agent sets a changed file's group to what it is and opens
it for writing, which whoever watches it or its folder hears of. Nothing is made or removed for the sake of an event:
that a file has gone or is new shows as a change of its folder.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qvm.errors import QvmError
from qvm.guest.changes import Changes, is_left_out, state_of
from qvm.guest.channel import AgentChannel
from qvm.instance.mounted import MountedFolder
from qvm.log import get_logger

if TYPE_CHECKING:
    from watchdog.events import FileSystemEvent
    from watchdog.observers.api import BaseObserver

log = get_logger(__name__)

_WATCHED = frozenset(("created", "modified", "moved", "deleted", "closed"))
HOLD_PATIENCE = 5.0
"""Seconds that a start waits for the guest to look through the mounts; large ones are done in the background."""
_BATCH = 500
"""Paths in one message to the agent."""


def has_capabilities(path: Path) -> bool:
    """A chown, which is how the guest shows a change, would take them away (capabilities(7))."""
    try:
        return bool(os.getxattr(path, "security.capability", follow_symlinks=False))
    except (OSError, AttributeError):  # none; a system without them
        return False


class HostWatch:
    def __init__(self, channel: AgentChannel, tell: Callable[[str], None]) -> None:
        """`tell` hears what the user should know."""
        self._channel = channel
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._changes = Changes()
        self._folders: tuple[MountedFolder, ...] = ()
        self._sources: dict[MountedFolder, Path] = {}
        self._observer: BaseObserver | None = None
        self._noted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._holding: asyncio.Task[None] | None = None

    async def follow(self, folders: Sequence[MountedFolder]) -> None:
        """Watch these folders from now on, and no others. Where they are the same, the agent may be another one."""
        wanted = tuple(each for each in folders if not each.parked)
        if wanted == self._folders:
            self._hold_again()
            return
        await self._end_observer()
        self._folders = wanted
        # FSEvents tells real paths (/private/var for /var).
        self._sources = {each: Path(os.path.realpath(each.mount.source)) for each in wanted if each.mount.writable}
        for each in wanted:
            if not each.mount.writable:
                self._tell(f"changes in {each.mount.source} cannot be replayed in the VM: it is mounted read-only")
        # Listing a large tree takes seconds, for which nobody need wait.
        threading.Thread(target=self._observe, args=(wanted,), daemon=True, name="watch").start()
        await asyncio.wait({self._hold_again()}, timeout=HOLD_PATIENCE)
        if self._task is None:
            self._task = asyncio.create_task(self._replay(), name="replay changes")

    def _hold_again(self) -> asyncio.Task[None]:
        """Have the agent hold what is watched: another agent, after a reboot, holds nothing yet."""
        if self._holding is not None:
            self._holding.cancel()
        self._holding = asyncio.create_task(self._hold(), name="hold watched mounts")
        return self._holding

    async def _hold(self) -> None:
        try:
            held = await self._channel.watch_mounts([each.mount.target for each in self._sources])
            log.info("%d files and folders can be watched in the guest", held)
        except QvmError as error:
            log.warning("not all of the mounts can be watched: %s", error.message)

    async def close(self) -> None:
        for task in (self._task, self._holding):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._folders = ()
        await self._end_observer()

    async def _end_observer(self) -> None:
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            await asyncio.to_thread(observer.join)

    def _observe(self, wanted: tuple[MountedFolder, ...]) -> None:
        """In a thread."""
        from watchdog.events import FileSystemEventHandler
        from watchdog.observers import Observer

        handler = FileSystemEventHandler()
        handler.on_any_event = self._see  # type: ignore[method-assign]
        observer = Observer()
        observer.daemon = True
        began = time.monotonic()
        observer.start()
        for source in dict.fromkeys(self._sources.values()):
            try:
                observer.schedule(handler, str(source), recursive=True)
            except OSError as error:  # ENOSPC: fs.inotify.max_user_watches
                self._post(self._tell, f"changes in {source} are not watched: {error.strerror or error}"
                           f"{'; raise fs.inotify.max_user_watches' if error.errno == 28 else ''}")
        self._post(self._took, observer, wanted, time.monotonic() - began)

    def _took(self, observer: BaseObserver, wanted: tuple[MountedFolder, ...], seconds: float) -> None:
        if wanted != self._folders:  # others are followed meanwhile, or none
            observer.stop()
            return
        self._observer = observer
        log.info("watching %d folders after %.2f s", len(self._sources), seconds)

    def _post(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            log.debug("an event came after the end")

    def _see(self, event: FileSystemEvent) -> None:
        """In the observer's thread."""
        if event.event_type in _WATCHED:
            paths = [Path(os.fsdecode(name)) for name in (event.src_path, event.dest_path) if name]
            self._post(self._note, paths)

    def _note(self, paths: Sequence[Path]) -> None:
        now = self._loop.time()
        for path in paths:
            self._changes.note(path, now)
            self._changes.note(path.parent, now)
        self._noted.set()

    async def _replay(self) -> None:
        while True:
            due = self._changes.next_due()
            if due is None:
                self._noted.clear()
                await self._noted.wait()
                continue
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            taken = self._changes.take_due(self._loop.time())
            found = await asyncio.to_thread(lambda paths: [(path, state_of(path)) for path in paths], taken)
            gone = [place for path, state in found if state is None for place in self._places(path)]
            paths = [place for path in self._changes.choose(found) if not has_capabilities(path)
                     for place in self._places(path)]
            await self._show(paths, gone)

    async def _show(self, paths: Sequence[str], gone: Sequence[str]) -> None:
        try:
            for begin in range(0, max(len(paths), len(gone)), _BATCH):
                await self._channel.show_changes(paths[begin : begin + _BATCH], gone[begin : begin + _BATCH])
        except QvmError as error:  # the guest reboots, say: whoever watched there is gone too
            log.warning("%d changes were not replayed: %s", len(paths) + len(gone), error.message)

    def _places(self, path: Path) -> list[str]:
        """Where a path of the host is in the guest; more than one where mounts overlap."""
        return [
            str(each.mount.target / path.relative_to(source))
            for each, source in self._sources.items()
            if path.is_relative_to(source) and not is_left_out(path.relative_to(source))
        ]

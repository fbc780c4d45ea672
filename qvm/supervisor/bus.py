"""The supervisor's events: kept for late watchers, delivered in order to each."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

# A watcher that joins late sees the whole start; a supervisor that lives for months keeps only the newest.
HISTORY = 500


class Bus:
    """Publish dicts; every watcher sees all of `history` and then what comes, until `close`."""

    def __init__(self) -> None:
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self._queues: set[asyncio.Queue[dict[str, Any] | None]] = set()
        self._closed = False

    def publish(self, event: str, **values: Any) -> None:
        entry = {"event": event, "time": time.time(), **values}
        self.history.append(entry)
        for queue in self._queues:
            queue.put_nowait(entry)

    def close(self) -> None:
        """No more events; watchers end after those they have not read yet."""
        self._closed = True
        for queue in self._queues:
            queue.put_nowait(None)

    async def watch(self) -> AsyncIterator[dict[str, Any]]:
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        for past in self.history:
            queue.put_nowait(past)
        if self._closed:
            queue.put_nowait(None)
        self._queues.add(queue)
        try:
            while (entry := await queue.get()) is not None:
                yield entry
        finally:
            self._queues.discard(queue)

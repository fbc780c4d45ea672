"""The seed's end may be told in the same packet as the hello that still says it is pending."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path

from qvm.guest.channel import AgentChannel


def test_a_seed_event_right_behind_the_hello_counts(tmp_path: Path) -> None:
    async def work() -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(tmp_path / "s"))
        listener.listen()
        listener.setblocking(False)
        channel = AgentChannel()
        await channel.connect(tmp_path / "s")
        loop = asyncio.get_running_loop()
        peer, _ = await loop.sock_accept(listener)
        greeting = asyncio.ensure_future(channel.hello(10))
        asked = json.loads((await loop.sock_recv(peer, 4096)).strip())
        hello = {"id": asked["id"], "ok": True, "nonce": asked["nonce"], "boot_id": "b", "version": 1, "digest": "d",
                 "pid": 1, "uptime": 1.0, "seed": {"state": "pending"}}
        event = {"event": "seed", "state": "failed", "errors": [{"step": "seed", "message": "broken"}]}
        await loop.sock_sendall(peer, f"{json.dumps(hello)}\n{json.dumps(event)}\n".encode())
        await greeting
        assert (await asyncio.wait_for(channel.wait_for_seed(), 10)).state == "failed"
        await channel.close()
        peer.close()
        listener.close()

    asyncio.run(work())

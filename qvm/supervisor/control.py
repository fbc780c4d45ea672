"""The control socket's server side: reads one request a connection, streams events, sends one answer."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from qvm.errors import QvmError, UsageError
from qvm.filenames import check_socket_path
from qvm.log import get_logger

log = get_logger(__name__)

MAX_REQUEST = 16 * 1024 * 1024

Send = Callable[[dict[str, Any]], Awaitable[None]]
Handler = Callable[[dict[str, Any], Send], Awaitable[dict[str, Any]]]


@asynccontextmanager
async def serve_control(path: Path, handlers: dict[str, Handler]) -> AsyncIterator[None]:
    """Serve `handlers` (op -> coroutine) on a 0600 unix socket while the block runs."""
    check_socket_path(path)
    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(
            lambda reader, writer: _converse(reader, writer, handlers), path=str(path), limit=MAX_REQUEST
        )
    finally:
        os.umask(before)
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


async def _converse(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, handlers: dict[str, Handler]
) -> None:
    async def send(message: dict[str, Any]) -> None:
        writer.write(json.dumps(message).encode() + b"\n")
        await writer.drain()

    try:
        line = await reader.readline()
        if line:
            await send(await _answer(line, handlers, send))
    except (ConnectionError, ValueError) as error:
        log.debug("a control connection broke: %s", error)
    finally:
        writer.close()


async def _answer(line: bytes, handlers: dict[str, Handler], send: Send) -> dict[str, Any]:
    try:
        request = json.loads(line)
        handler = handlers.get(str(request.get("op"))) if isinstance(request, dict) else None
        if handler is None:
            raise UsageError(f"unknown request {line[:80]!r}")
        return {"result": await handler(request, send)}
    except QvmError as error:
        return {"error": error.to_dict()}
    except ConnectionError:
        raise
    except Exception as error:  # the asker must hear of a defect too, and the supervisor must live on
        log.exception("request failed: %r", line[:200])
        return {"error": QvmError(f"the supervisor failed: {error!r}", hint="this is a defect in qvm").to_dict()}

"""Files into the guest: by a byte stream to a receiver there, or by the standard input of a command."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from qvm.errors import DeadlineError, GuestCommandError, GuestError
from qvm.guest.dial import Dialer

if TYPE_CHECKING:
    from qvm.guest.channel import AgentChannel
    from qvm.guest.guestprocess import GuestProcess

_PIECE = 256 << 10
_BEGIN = """
set -e
mkdir -p "${1%/*}"
"""
_END = """
[ "$(stat -c %s "$1.new")" = "$3" ] || { rm -f "$1.new"; echo "it arrived incomplete" >&2; exit 1; }
chmod "$2" "$1.new"
mv "$1.new" "$1"
"""
_FROM_INPUT = _BEGIN + 'cat >"$1.new"\n' + _END
# The guest's agent needs this Python anyway.
_RECEIVER = """
import os, socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[2])
listener.listen(1)
print("listening", flush=True)
connection, _ = listener.accept()
os.unlink(sys.argv[2])
buffer = bytearray(1 << 20)
with open(sys.argv[1], "wb", 0) as file:
    while size := connection.recv_into(buffer):
        file.write(memoryview(buffer)[:size])
"""
_FROM_STREAM = _BEGIN + 'python3 -ISc "$5" "$1.new" "$4"\n' + _END


async def send_file(
    channel: AgentChannel, streams: Dialer | None, source: Path, target: PurePosixPath, *, mode: int, timeout: float
) -> None:
    """See `AgentChannel.send_file`."""
    words = [str(target), f"{mode:o}", str(source.stat().st_size)]
    late = f"{source.name} was not copied into the guest within {timeout:g} s"
    socket = f"/run/qvm-send-{secrets.token_hex(8)}"
    script = _FROM_INPUT if streams is None else _FROM_STREAM
    process = channel.start_process(["sh", "-c", script, "take", *words, socket, _RECEIVER], stdin=streams is None,
                                    timeout=timeout)
    try:
        async with asyncio.timeout(timeout):
            said = await (_by_input(process, source) if streams is None
                          else _by_stream(process, streams, socket, source))
            code = await process.wait()
    except TimeoutError:
        raise DeadlineError(late) from None
    finally:
        process.close()
    if process.timed_out:
        raise DeadlineError(late)
    if code != 0:
        raise GuestCommandError(f"{target} could not be written in the guest",
                                details=said.decode(errors="replace").strip() or None)


async def _by_input(process: GuestProcess, source: Path) -> bytes:
    with source.open("rb") as file:
        while data := await asyncio.to_thread(file.read, _PIECE):
            await process.write(data)
    process.write_eof()
    return b"".join([data async for _, data in process])


async def _by_stream(process: GuestProcess, streams: Dialer, socket: str, source: Path) -> bytes:
    said: list[bytes] = []
    async for _, data in process:
        said.append(data)
        if b"listening\n" in b"".join(said):
            said.clear()
            await _pour(streams, socket, source)
    return b"".join(said)


async def _pour(streams: Dialer, socket: str, source: Path) -> None:
    connection = await streams.open_unix(socket)
    try:
        with source.open("rb") as file:
            while data := await asyncio.to_thread(file.read, _PIECE):
                await connection.send(data)
        await connection.send_eof()
        while await connection.recv():  # until the receiver has taken all, and closes
            raise GuestError("the guest answered where it should only listen")
    finally:
        await connection.close()

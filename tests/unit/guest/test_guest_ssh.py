from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from qvm.errors import GuestError
from qvm.guest.sshstream import SshStream
from qvm.guest.sshwire import PACKET_OVERHEAD, WINDOW, Notice


class FakeTransport:
    """Runs jobs at once and records what would be sent."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.sent: list[tuple[int, bytes]] = []
        self.opened: list[tuple[str, tuple[str | int, ...]]] = []

    def submit(self, work):  # type: ignore[no-untyped-def]
        done = self.loop.create_future()
        work()
        done.set_result(None)
        return done

    def open_stream(self, stream: SshStream, kind: str, target: tuple[str | int, ...]) -> None:
        self.opened.append((kind, target))
        stream.channel = FakeChannel()  # type: ignore[assignment]

    def send_message(self, message) -> None:  # type: ignore[no-untyped-def]
        raw = message.asbytes()
        self.sent.append((raw[0], raw[5:]))

    def forget(self, chanid: int) -> None:
        self.sent.append((0, b"forgotten"))


class FakeChannel:
    chanid = 0
    remote_chanid = 7


DATA, EOF, CLOSE, WINDOW_ADJUST = 94, 96, 97, 93


async def opened(window: int = 100, packet: int = 10) -> tuple[SshStream, FakeTransport]:
    transport = FakeTransport()
    stream = SshStream(transport, "test")  # type: ignore[arg-type]
    opening = asyncio.create_task(stream.open("direct-tcpip", ("h", 1), timeout=5))
    await asyncio.sleep(0)
    stream.post(Notice.OPENED, (window, packet + PACKET_OVERHEAD))
    await opening
    return stream, transport


def test_sending_keeps_within_packet_and_window() -> None:
    async def main() -> None:
        stream, transport = await opened(window=25, packet=10)
        sending = asyncio.create_task(stream.send(b"x" * 40))
        await asyncio.sleep(0.01)
        assert [len(data) - 4 for _, data in transport.sent] == [10, 10, 5] and not sending.done()
        stream.post(Notice.WINDOW, 100)
        await sending
        assert [len(data) - 4 for _, data in transport.sent] == [10, 10, 5, 10, 5]

    asyncio.run(main())


def test_reading_acknowledges_in_large_steps() -> None:
    async def main() -> None:
        stream, transport = await opened()
        for _ in range(2):
            stream.post(Notice.DATA, b"x" * (WINDOW // 10))
        assert len(await stream.recv(1000)) == 1000
        assert transport.sent == []
        while (await stream.recv()) and stream._pieces:
            pass
        kinds = [kind for kind, _ in transport.sent]
        assert kinds == [WINDOW_ADJUST]

    asyncio.run(main())


def test_pieces_are_joined_up_to_the_limit_and_split_at_it() -> None:
    async def main() -> None:
        stream, _ = await opened()
        for piece in (b"ab", b"cd", b"ef"):
            stream.post(Notice.DATA, piece)
        await asyncio.sleep(0)
        assert await stream.recv(3) == b"abc"
        assert await stream.recv(100) == b"def"

    asyncio.run(main())


def test_an_end_is_an_end_and_a_close_without_one_is_a_reset() -> None:
    async def main() -> None:
        orderly, _ = await opened()
        orderly.post(Notice.DATA, b"last")
        orderly.post(Notice.EOF, None)
        orderly.post(Notice.CLOSED, None)
        await asyncio.sleep(0)
        assert [await orderly.recv(), await orderly.recv(), await orderly.recv()] == [b"last", b"", b""]
        broken, _ = await opened()
        broken.post(Notice.DATA, b"last")
        broken.post(Notice.CLOSED, None)
        await asyncio.sleep(0)
        assert await broken.recv() == b"last"
        with pytest.raises(GuestError, match="reset"):
            await broken.recv()
        with pytest.raises(GuestError, match="reset"):
            await broken.send(b"x")

    asyncio.run(main())


def test_close_is_sent_once_whoever_begins() -> None:
    async def main() -> None:
        for we_begin in (True, False):
            stream, transport = await opened()
            if we_begin:
                await stream.close()
            stream.post(Notice.EOF, None)
            stream.post(Notice.CLOSED, None)
            await asyncio.sleep(0)
            await stream.close()
            assert transport.sent == [(CLOSE, b""), (0, b"forgotten")]

    asyncio.run(main())


def test_giving_up_an_opening_closes_the_channel_that_opens_later() -> None:
    async def main() -> None:
        transport = FakeTransport()
        stream = SshStream(transport, "test")  # type: ignore[arg-type]
        with pytest.raises(GuestError, match=r"within 0\.01 s"):
            await stream.open("direct-tcpip", ("h", 1), timeout=0.01)
        assert transport.sent == []
        stream.post(Notice.OPENED, (100, 100))
        await asyncio.sleep(0)
        assert transport.sent == [(CLOSE, b"")]

    asyncio.run(main())


def test_a_refusal_carries_the_reason() -> None:
    async def main() -> None:
        transport = FakeTransport()
        stream = SshStream(transport, "port 5")  # type: ignore[arg-type]
        opening = asyncio.create_task(stream.open("direct-tcpip", ("h", 5), timeout=5))
        await asyncio.sleep(0)
        stream.post(Notice.REFUSED, "Connect failed")
        with pytest.raises(GuestError, match="the guest refused port 5: Connect failed"):
            await opening
        assert transport.sent == []

    asyncio.run(main())


def test_waiting_readers_and_writers_hear_of_the_end() -> None:
    async def main() -> None:
        stream, _ = await opened(window=0)
        waiting = [asyncio.create_task(stream.recv()), asyncio.create_task(stream.send(b"x"))]
        await asyncio.sleep(0.01)
        stream.post(Notice.CLOSED, "the SSH connection broke")
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, GuestError)

    asyncio.run(main())


def test_importing_the_modules_does_not_load_paramiko() -> None:
    code = ("import sys, qvm.guest.ssh, qvm.guest.keys, qvm.guest.forward, qvm.guest.sockets, qvm.runtime.registry\n"
            "assert not {'paramiko', 'cryptography'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)

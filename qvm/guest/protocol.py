"""What host and agent say to each other. `cloud-init/agent/` is the other side and follows this page.

The control channel
===================
Virtio-serial port `org.qvm.agent`; on the host a unix socket that QEMU serves to one client at a time. QEMU keeps what
the host writes until the guest opens the port, so a host may speak before the guest has booted. Messages are JSON
objects, one a line, at most `MAX_MESSAGE` bytes of payload each; bytes travel as base64. A line that is no message is
answered by a `garbage` event and otherwise ignored.

A session begins with `hello` and its nonce. The agent then forgets the session before (its commands are killed, its
unsent output dropped), and the host ignores every line before the answer that carries its nonce: they belong to a
host process that is gone. The same nonce twice is the same session.

Host to guest, `{"id": N, "op": ...}`; the guest answers `{"id": N, "ok": true, ...}` or `{"id": N, "error": "text"}`:

    hello       nonce                           -> nonce, boot_id, version, digest (SHA-256 of the agent), pid,
                                                   uptime (s), seed (see the event)
    exec        argv, cwd, env, user, input (base64), stdin (true: more input follows), timeout (s),
                tty {rows, cols, term}: on a terminal of its own, whose output is all "out"
                -> any number of {"id", "out"|"err": base64} and {"id", "taken": bytes of input written}, then
                   {"id", "exit": code, "timed_out"}; 128 + n for signal n, 127 and 126 as a shell has them
    stdin       data, eof                       more input for exec `id`; at most `INPUT_WINDOW` bytes not yet taken
    ack         bytes                           output of exec `id` consumed; at most `OUTPUT_WINDOW` is sent ahead
    signal      signal                          to the process group of exec `id`, and its terminal's foreground one
    resize      rows, cols                      of exec `id`'s terminal
    hang_up     output ("out", "err")           nobody reads that output of exec `id` any more: a broken pipe
    write_file  path, data, mode, owner [uid, gid], more   -> changed; with `more` messages of the same id follow
    set_clock   time (ns since the epoch)       -> off (ns), changed; nothing is done below 50 ms
    mount       tag, target, writable, mmap, user {uid, gid, home} -> changed
    watch_mounts targets                        -> held: files and folders below; they can be watched from then on
    changed     paths, gone                     -> shown; watchers see IN_ATTRIB and IN_CLOSE_WRITE
    umount      target, lazy                    -> changed
    apply       document (as in the seed)       -> seed; with a section `fork` (below) stale [names] in it
    freeze      stage (ahead, runtime, base, running) -> timings; after `ahead`, which comes first, and another the
                                                machine is ready to be frozen, its disks are written
    stir        entropy (base64)                the kernel's random numbers go on from there
    track       name, file, process             -> found: places in memory of an id that each fork shall have anew
    grow                                        -> grown [mount points]
    hardware    cpus, memory (bytes)            -> cpus, memory, complete; waits for what was plugged in
    emulation   enabled                         -> emulators [names in binfmt_misc that are on]
    mount_users targets                         -> users [{pid, comm, target, how, container}]
    listeners                                   -> tcp, udp, as in the event, which is sent from now on
    streams     marker (base64)                 the stream port starts anew where these bytes come by
    shutdown    reboot
    update      data, more                      -> changed; then the new agent's `started` event, and a new hello is due

A document's `fork` section makes a machine that was frozen another one: clock_ns (the host's time at sending), entropy
(base64), machine_id (32 hexadecimal digits), boot_id and uuid (UUIDs to be shown), mac, data_disk ("bind": look at it
anew). Entropy and clock come first, the rest of the document with them.

Events, guest to host, without an id:

    started     pid                             a new agent has opened the port: older requests are lost
    seed        state (pending, absent, applied, failed), errors [{step, message}], seconds, timings
    listeners   tcp, udp [[address, port], ...] the whole lists, within 150 ms of a change
    garbage     message

The byte streams
================
Port `org.qvm.stream`. After `streams` was answered, the host writes the marker (16 random bytes) and the guest, having
dropped all before it, writes it back; what follows on both sides are frames: stream number (u32), kind (u8), length
(u32), big-endian, then the payload. Numbers are the host's choice and never used twice in a session.

    OPEN    host   u32 credit, then what to connect to: "tcp:ADDRESS:PORT", "unix:PATH", "udp:ADDRESS:PORT", where
                   each DATA is one datagram; or "listen:" before the first two, which sends one byte of DATA for each
                   connection that somebody has made; or "accept:NUMBER" for the next connection of that listener
    OPENED  guest  u32 credit
    FAILED  guest  why, as text; the stream is over
    DATA    both   at most `MAX_FRAME` bytes and never more than the credit that is left
    EOF     both   the sender's half is over; after both halves the stream is
    RESET   both   the stream is over at once; why, as text
    CREDIT  both   u32 more bytes that the sender of this frame can take
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MAX_MESSAGE = 1 << 20
MAX_LINE = 4 << 20
"""A line longer than this is no message of ours."""
CHUNK = 256 << 10
"""Bytes of a file or of a command's input in one message."""
OUTPUT_WINDOW = 1 << 20
INPUT_WINDOW = 512 << 10

OPEN, OPENED, FAILED, DATA, EOF, RESET, CREDIT = range(1, 8)
HEADER = struct.Struct(">IBI")
MAX_FRAME = 64 << 10
STREAM_WINDOW = 512 << 10
MARKER_SIZE = 16


@dataclass(frozen=True, slots=True)
class SeedState:
    """How far the agent is with the seed."""

    state: str
    """pending, absent, applied or failed."""
    errors: tuple[str, ...] = ()
    """One line for each step that failed."""
    seconds: float = 0.0
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds by step."""
    stale: tuple[str, ...] = ()
    """Tracked ids (`AgentChannel.track_id`) that a running program still has as they were before the fork."""

    @property
    def done(self) -> bool:
        return self.state != "pending"

    @classmethod
    def from_message(cls, data: dict[str, Any]) -> SeedState:
        errors = tuple(f"{item['step']}: {item['message']}" for item in data.get("errors") or ())
        return cls(str(data["state"]), errors, float(data.get("seconds") or 0.0), dict(data.get("timings") or {}),
                   tuple(data.get("stale") or ()))


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the guest has switched on."""

    cpus: int
    memory: int
    """Bytes, without what the kernel keeps for itself (MemTotal)."""
    complete: bool
    """Whether all that was expected has come."""


@dataclass(frozen=True, slots=True)
class MountUser:
    """A process in the guest that holds a mount."""

    pid: int
    comm: str
    target: str
    how: str
    """cwd, root, exe, fd, map, or "mount PATH" for one of its own elsewhere (a container's volume)."""
    container: str | None
    """Id of the container it runs in."""

    @classmethod
    def from_message(cls, data: dict[str, Any]) -> MountUser:
        return cls(int(data["pid"]), str(data["comm"]), str(data["target"]), str(data["how"]), data.get("container"))


@dataclass(frozen=True, slots=True)
class Hello:
    """Who answered at the other end."""

    nonce: str
    boot_id: str
    version: int
    digest: str
    """SHA-256 of the agent's own file, hexadecimal."""
    pid: int
    uptime: float
    """Seconds since the guest's kernel started."""
    seed: SeedState

    @classmethod
    def from_message(cls, data: dict[str, Any]) -> Hello:
        return cls(str(data["nonce"]), str(data["boot_id"]), int(data["version"]), str(data["digest"]),
                   int(data["pid"]), float(data["uptime"]), SeedState.from_message(data["seed"]))


def encode_message(message: dict[str, Any]) -> bytes:
    """One line; ValueError where it is too long to be sent."""
    line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(line) > MAX_MESSAGE:
        raise ValueError(f"a message of {len(line)} bytes is too long for the agent ({MAX_MESSAGE})")
    return line


class LineParser:
    """Bytes in, messages out; what is no message is dropped."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        self._buffer += data
        while (at := self._buffer.find(b"\n")) >= 0:
            line = bytes(self._buffer[:at])
            del self._buffer[: at + 1]
            try:
                message = json.loads(line) if line.strip() else None
            except ValueError:
                continue
            if isinstance(message, dict):
                yield message
        if len(self._buffer) > MAX_LINE:
            self._buffer.clear()


def encode_frame(number: int, kind: int, payload: bytes = b"") -> bytes:
    return HEADER.pack(number, kind, len(payload)) + payload


class FrameParser:
    """Bytes in, frames (number, kind, payload) out, from behind the session's marker on."""

    def __init__(self, marker: bytes) -> None:
        self._marker = marker
        self._buffer = bytearray()
        self.begun = False

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """ValueError where the bytes are no frames: the session is lost."""
        self._buffer += data
        if not self.begun:
            at = self._buffer.find(self._marker)
            if at < 0:
                del self._buffer[: -len(self._marker)]
                return
            del self._buffer[: at + len(self._marker)]
            self.begun = True
        at, end = 0, len(self._buffer)
        try:
            while end - at >= HEADER.size:
                number, kind, length = HEADER.unpack_from(self._buffer, at)
                if not OPEN <= kind <= CREDIT or length > MAX_FRAME:
                    raise ValueError(f"no frame: kind {kind}, {length} bytes")
                if end - at - HEADER.size < length:
                    return
                start = at + HEADER.size
                at = start + length
                yield number, kind, bytes(self._buffer[start:at])
        finally:
            del self._buffer[:at]

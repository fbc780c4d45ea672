"""Runs in the guest: the host's names for containers. The standard library only; systemd starts it at the first query.

    dnsd.py GATEWAY NAME...

Containers ask the name servers of the guest's /etc/resolv.conf; a rule of the kernel's brings what they ask here. The
names given are answered with the gateway's address, everything else is asked on. RFC 1035, section 4.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
import time

TYPE_CHECKING = False  # importing `typing` costs the guest more than all the rest
if TYPE_CHECKING:
    from typing import Any

IDLE, PATIENCE = 120.0, 10.0  # seconds until we end, and until a question counts as unanswered
A, IN = 1, 1


def question(message: bytes) -> tuple[str, int, int] | None:
    """(name, type, length up to its end) of a query with one question, else None."""
    if len(message) < 17 or message[2] & 0x80 or message[4:6] != b"\0\1":
        return None
    labels, at = [], 12
    while at < len(message) and message[at]:
        if message[at] > 63:
            return None
        labels.append(message[at + 1 : at + 1 + message[at]])
        at += 1 + message[at]
    if at + 5 > len(message):
        return None
    kind, family = struct.unpack_from(">HH", message, at + 1)
    name = b".".join(labels).decode("ascii", "replace").lower()
    return (name, kind, at + 5) if family == IN else None


def answer(message: bytes, end: int, kind: int, address: str) -> bytes:
    """The reply: the address where one was asked for, else "there is none of that type" (RFC 2308, section 2.2)."""
    known = kind == A
    head = message[:2] + struct.pack(">HHHHH", 0x8080 | (message[2] & 1) << 8, 1, int(known), 0, 0)
    record = struct.pack(">HHHIH", 0xC00C, A, IN, 60, 4) + socket.inet_aton(address) if known else b""
    return head + message[12:end] + record


def nameserver(path: str = "/etc/resolv.conf") -> str | None:
    with open(path) as file:  # noqa: PTH123  pathlib would be half of our memory
        for line in file:
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                return words[1]
    return None


def forward_reply(onward: socket.socket, listener: socket.socket, asker: Any) -> None:
    try:
        listener.sendto(onward.recv(65535), asker)
    except OSError:
        return  # the server refuses: who asked will ask again, or another one
    finally:
        onward.close()


def serve(listener: socket.socket, address: str, names: set[str]) -> None:
    waiting: dict[socket.socket, tuple[Any, float]] = {}  # socket -> (who asked, until when)
    last = time.monotonic()
    while True:
        ready = select.select([listener, *waiting], [], [], PATIENCE if waiting else IDLE)[0]
        now = time.monotonic()
        if ready:
            last = now
        elif now - last >= IDLE:
            return
        for each in ready:
            if each is listener:
                message, asker = listener.recvfrom(65535)
                asked = question(message)
                if asked is not None and asked[0] in names:
                    listener.sendto(answer(message, asked[2], asked[1], address), asker)
                    continue
                server = nameserver()
                if server is None:
                    continue
                onward = socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM)
                try:
                    onward.connect((server, 53))
                    onward.send(message)
                    waiting[onward] = (asker, now + PATIENCE)
                except OSError:
                    onward.close()
            else:
                forward_reply(each, listener, waiting.pop(each)[0])
        for each in [each for each, (_, until) in waiting.items() if until < now]:
            del waiting[each]
            each.close()


if __name__ == "__main__":
    # systemd passes the listening socket as descriptor 3 (sd_listen_fds(3)).
    serve(socket.socket(fileno=3), sys.argv[1], set(sys.argv[2:]))

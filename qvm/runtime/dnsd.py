"""Runs in the guest: names for containers, and for the guest itself where domains have name servers of their own. The
standard library only; systemd starts it at the first query.

Containers ask the name servers of the guest's /etc/resolv.conf; a rule of the kernel's brings what they ask here. What
qvm wrote into /etc/hosts is answered, and what `RULES` says; everything else is asked on. RFC 1035, section 4.

    address *.NAME ADDRESS      all names below NAME
    domain NAME ADDRESS...      the name servers of NAME and what is below it
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time

TYPE_CHECKING = False  # importing `typing` costs the guest more than all the rest
if TYPE_CHECKING:
    from typing import Any

IDLE, PATIENCE = 120.0, 10.0  # seconds until we end, and until a question counts as unanswered
A, AAAA, IN, TTL = 1, 28, 1, 5
HOSTS, RULES, RESOLVER = "/etc/hosts", "/etc/qvm/names", "/etc/resolv.conf"
SO_MARK, MARK = 36, 0x716D  # our own questions, for the rule that would bring them back to us (socket(7))


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


def answer(message: bytes, end: int, kind: int, addresses: list[str]) -> bytes:
    """The reply: addresses of the type asked for, else "there is none of that type" (RFC 2308, section 2.2)."""
    packed = [socket.inet_pton(socket.AF_INET6 if ":" in each else socket.AF_INET, each) for each in addresses
              if kind == (AAAA if ":" in each else A)]
    head = message[:2] + struct.pack(">HHHHH", 0x8080 | (message[2] & 1) << 8, 1, len(packed), 0, 0)
    return head + message[12:end] + b"".join(
        struct.pack(">HHHIH", 0xC00C, kind, IN, TTL, len(each)) + each for each in packed)


class Names:
    """What is known here; files are read again when they have changed."""

    def __init__(self, hosts: str = HOSTS, rules: str = RULES) -> None:
        self.hosts, self.rules = hosts, rules
        self.stamp: Any = None
        self.names: dict[str, list[str]] = {}
        self.below: dict[str, list[str]] = {}
        self.domains: dict[str, list[str]] = {}

    def refresh(self) -> None:
        stamp = [(each.st_mtime_ns, each.st_size, each.st_ino) for path in (self.hosts, self.rules)
                 if os.path.exists(path) for each in (os.stat(path),)]  # noqa: PTH110, PTH116
        if stamp == self.stamp:
            return
        self.stamp, self.names, self.below, self.domains = stamp, {}, {}, {}
        ours = False
        for words in lines(self.hosts):
            if words[:1] == ["#"] and words[1:2] == ["qvm"]:
                ours = words[2:] == ["begin"]
            elif ours and not words[0].startswith("127."):
                for name in words[1:]:
                    self.names.setdefault(name.lower(), []).append(words[0])
        for words in lines(self.rules):
            if words[0] == "address":
                self.below.setdefault(words[1].removeprefix("*.").lower(), []).append(words[2])
            elif words[0] == "domain":
                self.domains[words[1].lower()] = words[2:]

    def find(self, name: str) -> list[str] | None:
        """The addresses of a name; None where others know."""
        found = self.names.get(name)
        return found or next((self.below[each] for each in parents(name)[1:] if each in self.below), None)

    def servers(self, name: str) -> list[str]:
        """Who is asked for it."""
        return next((self.domains[each] for each in parents(name) if each in self.domains), None) or nameservers()[:1]


def parents(name: str) -> list[str]:
    """The name itself, then what it is below of, the nearest first."""
    labels = name.split(".")
    return [".".join(labels[at:]) for at in range(len(labels))]


def lines(path: str) -> list[list[str]]:
    if not os.path.exists(path):  # noqa: PTH110  pathlib would be half of our memory
        return []
    with open(path, errors="replace") as file:  # noqa: PTH123
        return [words for line in file if (words := line.split())]


def nameservers(path: str = RESOLVER) -> list[str]:
    return [words[1] for words in lines(path) if words[0] == "nameserver" and len(words) > 1]


def ask(server: str, message: bytes, port: int = 53, mark: int = 0) -> socket.socket | None:
    """A socket on which the server's reply will come; None where it cannot be asked."""
    onward = socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM)
    try:
        if mark:
            onward.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        onward.connect((server, port))
        onward.send(message)
    except OSError:
        onward.close()
        return None
    return onward


def serve(listener: socket.socket, names: Names, *, port: int = 53, mark: int = 0, idle: float = IDLE) -> None:
    waiting: dict[socket.socket, tuple[Any, float, list[socket.socket]]] = {}  # who asked, until when, all asked for it
    last = time.monotonic()
    while True:
        ready = select.select([listener, *waiting], [], [], PATIENCE if waiting else idle)[0]
        now = time.monotonic()
        if ready:
            last = now
        elif now - last >= idle:
            return
        for each in ready:
            if each is listener:
                message, asker = listener.recvfrom(65535)
                asked = question(message)
                names.refresh()
                known = None if asked is None else names.find(asked[0])
                if asked is not None and known is not None:
                    listener.sendto(answer(message, asked[2], asked[1], known), asker)
                    continue
                servers = names.servers(asked[0]) if asked is not None else nameservers()[:1]
                onward = [sock for server in servers if (sock := ask(server, message, port, mark))]
                waiting |= dict.fromkeys(onward, (asker, now + PATIENCE, onward))
            elif each in waiting:
                take_reply(each, listener, waiting)
        for each in [each for each, (_, until, _) in waiting.items() if until < now]:
            del waiting[each]
            each.close()


def take_reply(onward: socket.socket, listener: socket.socket, waiting: dict[socket.socket, Any]) -> None:
    """The first good reply is the one; a server that refuses leaves it to the others, or the asker asks again."""
    asker, _, together = waiting.pop(onward)
    together.remove(onward)
    try:
        reply = onward.recv(65535)
    except OSError:
        return
    finally:
        onward.close()
    if together and len(reply) > 3 and reply[3] & 15 in (2, 5):  # SERVFAIL, REFUSED
        return
    listener.sendto(reply, asker)
    for other in together:
        waiting.pop(other, None)
        other.close()
    together.clear()


if __name__ == "__main__":
    # systemd passes the listening socket as descriptor 3 (sd_listen_fds(3)).
    serve(socket.socket(fileno=3), Names(), mark=MARK)

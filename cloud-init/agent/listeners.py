"""Ports that can be reached in the guest."""

import _socket as socket
import _struct as struct
import os
import time

from .files import read, write_atomic
from .jsontext import parse_json
from .sockdiag import TCP_CLOSE, TCP_LISTEN, SocketDiag, parse_dump

PROTOCOLS = {"tcp": TCP_LISTEN, "udp": TCP_CLOSE}


class Listeners:
    """TCP and UDP ports that can be reached in the guest: listening sockets, for UDP those that are bound and not
    connected, and host ports that CNI redirects by netfilter.

    Listening sockets are read from sock_diag(7), which looks only at listeners; /proc/net/tcp would walk the table of
    all connections. Containers published by CNI's portmap plugin have no listener at all, but libcni keeps what it
    was asked for in its results cache, one file for each attachment, made on ADD and removed on DEL.
    """

    RESULTS = "/var/lib/cni/results"
    COUNTS = ("/proc/net/sockstat", "/proc/net/sockstat6")
    # Under emulation all dumps take 1 to 2 ms, and the numbers of sockets in use 0.05: what listens is looked at when a
    # number has changed, and else for one part in so many of the time. So a socket that came in the moment another
    # went is seen too, at once where the machine is quick and within the second where it is emulated.
    SPARING, LONGEST_REST = 200, 1.0
    STALE = "/run/qvm-cni-stale"

    def __init__(self, root="/"):
        self.results_folder, self.stale_file = root.rstrip("/") + self.RESULTS, root.rstrip("/") + self.STALE
        self.diag = SocketDiag()
        self.without_diag = set()
        self.seen_sockets = self.last = self.seen_counts = self.count_files = None
        self.next_look = 0.0
        self.published = set()
        self.seen = None
        self.again = 0
        self.stale = None

    def remember_stale(self):
        """Results that an unclean end of an earlier boot left belong to no container. To be called once the data disk
        is mounted and before containers start; a restarted agent finds what the first one of this boot wrote.
        """
        if not os.path.exists(self.stale_file):
            names = "".join(f"{name} {mtime}\n" for name, mtime in self.results())
            write_atomic(self.stale_file, names.encode(), 0o600)

    def results(self):
        try:
            with os.scandir(self.results_folder) as entries:
                return sorted((entry.name, entry.stat().st_mtime_ns) for entry in entries)
        except OSError:
            return []

    def changed(self):
        """The new lists {"tcp": [[address, port] ...], "udp": ...}, sorted, or None where they are as they were.

        Called several times a second for as long as the machine runs.
        """
        sockets, redirected = self.look(), self.redirected()
        if (sockets, redirected) == self.seen_sockets:
            return None
        self.seen_sockets = sockets, redirected
        found = set(redirected)
        for protocol, seen in zip(PROTOCOLS, sockets, strict=True):
            ports = parse_dump(seen) if isinstance(seen, bytes) else seen
            found |= {(protocol, address, port) for address, port in ports}
        if found == self.last:
            return None
        self.last = found
        return {protocol: [[address, port] for kind, address, port in sorted(found) if kind == protocol]
                for protocol in PROTOCOLS}

    def look(self):
        """What each protocol's sockets are; as they were where nothing suggests a change."""
        counts, began = self.counts(), time.monotonic()
        if counts is not None and counts == self.seen_counts and began < self.next_look and self.seen_sockets:
            return self.seen_sockets[0]
        self.seen_counts = counts
        sockets = [self.sockets(protocol) for protocol in PROTOCOLS]
        ended = time.monotonic()
        self.next_look = ended + min((ended - began) * self.SPARING, self.LONGEST_REST)
        return sockets

    def counts(self):
        """The lines of proc(5)'s sockstat that say how many sockets of TCP and UDP are in use; None without them."""
        if self.count_files is None:
            try:
                self.count_files = [
                    open(path, "rb", 0) for path in self.COUNTS if os.path.exists(path)  # noqa: SIM115  # kept
                ]
            except OSError:
                self.count_files = []
        if not self.count_files:
            return None
        first, *rest = [os.pread(file.fileno(), 1024, 0) for file in self.count_files]
        tcp, udp = first.find(b"TCP:"), first.find(b"UDP:")  # the memory changes with any traffic
        return [first[tcp : first.find(b" mem", tcp)], first[udp : first.find(b" mem", udp)], *rest]

    def sockets(self, protocol):
        """A dump of the kernel's, or where it makes none the (address, port) pairs."""
        if protocol not in self.without_diag:
            try:
                return self.diag.dump(protocol)
            except OSError:
                if protocol == "udp":  # a module of its own, which a kernel may lack
                    self.without_diag.add(protocol)
        return self.by_proc(protocol)

    def by_proc(self, protocol):
        found = set()
        for name, family in ((protocol, socket.AF_INET), (protocol + "6", socket.AF_INET6)):
            for line in (read(f"/proc/net/{name}") or b"").decode().splitlines()[1:]:
                words = line.split()
                if int(words[3], 16) == PROTOCOLS[protocol]:
                    address, port = words[1].split(":")
                    raw = bytes.fromhex(address)
                    raw = b"".join(struct.pack("=I", word) for word in struct.unpack(f">{len(raw) // 4}I", raw))
                    found.add((socket.inet_ntop(family, raw), int(port, 16)))
        return found

    def redirected(self):
        if self.stale is None:
            known = read(self.stale_file)
            if known is None:
                return self.published
            self.stale = set(known.decode().splitlines())
        try:
            stamp = os.stat(self.results_folder).st_mtime_ns
        except OSError:
            stamp = 0
        if stamp != self.seen:
            # A file may be seen before it is filled, so look again at the next two ticks.
            self.seen, self.again = stamp, 3
        if self.again:
            self.again -= 1
            self.published = {
                port for name, mtime in self.results() if f"{name} {mtime}" not in self.stale
                for port in self.mappings(read(f"{self.results_folder}/{name}") or b"")
            }
        return self.published

    @staticmethod
    def mappings(raw):
        try:
            wanted = parse_json(raw)["capabilityArgs"]["portMappings"]
            for mapping in wanted:
                # go-cni writes HostPort where CNI's convention says hostPort; Go reads either.
                item = {key.lower(): value for key, value in mapping.items()}
                protocol = item.get("protocol", "tcp").lower()
                if protocol in PROTOCOLS and item.get("hostport"):
                    yield protocol, item.get("hostip") or "0.0.0.0", int(item["hostport"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return

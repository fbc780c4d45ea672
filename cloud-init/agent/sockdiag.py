"""sock_diag(7): which sockets listen, looked at so often that a look must cost next to nothing."""

import _socket as socket
import _struct as struct

TCP_LISTEN, TCP_CLOSE = 10, 7
"""For UDP the latter is a socket that is bound and not connected."""
DONE, ERROR = 3, 2
_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
# Replies are allocated, and zeroed, as large as the largest buffer that was ever offered; one of 8 KiB is the least
# that is enough on machines with large pages (NLMSG_GOODSIZE).
_BUFFER = 8192


def _request(family, protocol, state):
    """inet_diag_req_v2: one family."""
    return struct.pack("=IHHIIBBBBI48x", 72, 20, _DUMP, 1, 0, family, protocol, 0, 0, 1 << state)


def _tcp_request():
    """inet_diag_req, the older form (TCPDIAG_GETSOCK): both families in one walk."""
    return struct.pack("=IHHII4x48xII", 76, 18, _DUMP, 1, 0, 1 << TCP_LISTEN, 0)


REQUESTS = {
    "tcp": (_tcp_request(),),
    "udp": tuple(_request(family, socket.IPPROTO_UDP, TCP_CLOSE) for family in (socket.AF_INET, socket.AF_INET6)),
}


class SocketDiag:
    """The kernel's replies as they are: two that are alike byte for byte need no reading."""

    def __init__(self):
        self.socket = None
        self.buffer = bytearray(_BUFFER)
        self.view = memoryview(self.buffer)

    def dump(self, protocol):
        """What the kernel says of a protocol's listeners, for `parse_dump`. OSError where it does not know how.

        Without a timeout, which would cost a poll(2) for each call: the answer is there when the question is sent.
        """
        if self.socket is None:
            self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 4)
        try:
            return b"".join([part for request in REQUESTS[protocol] for part in self._ask(request)])
        except OSError:
            self.socket.close()  # with what is left of the reply
            self.socket = None
            raise

    def _ask(self, request):
        self.socket.send(request)
        parts = []
        while True:
            size = self.socket.recv_into(self.buffer)
            kind = struct.unpack_from("=IH", self.buffer, 0)[1]
            if kind == ERROR:
                raise OSError(-struct.unpack_from("=i", self.buffer, 16)[0], "sock_diag")
            if kind == DONE:
                return parts
            parts.append(bytes(self.view[:size]))
            # By itself as a rule, at the end of the last listeners where a kernel thinks of it.
            if struct.unpack_from("=IH", self.buffer, size - 20) == (20, DONE):
                return parts


def parse_dump(raw):
    """The (address, port) pairs of a dump; a socket without a port is none that can be reached."""
    found, at = set(), 0
    while at < len(raw):
        length, kind = struct.unpack_from("=IH", raw, at)
        if kind != DONE:
            family, port = raw[at + 16], struct.unpack_from(">H", raw, at + 20)[0]
            size = 4 if family == socket.AF_INET else 16
            if port:
                found.add((socket.inet_ntop(family, raw[at + 24 : at + 24 + size]), port))
        at += (length + 3) & ~3
    return found

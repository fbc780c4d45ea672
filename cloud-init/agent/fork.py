"""A frozen machine goes on as another one."""

import os
import time

from .base import log, unb64
from .files import overwrite, read
from .ids import BOOT_ID, PRODUCT_ID, cover
from .kernel import add_entropy, interfaces, set_mac, write_kernel
from .personality import Personality

NEW_HOME = "/home/.qvm"  # a home that waits for its user


class Fork(Personality):
    """The first thing a restored machine does: become one of its own.

    Code that runs for the first time after a restore is translated anew under emulation, which is most of what this
    costs: so no programs, no new files where old ones do, and one thread (two that take turns cost more than they
    spare).
    """

    write = staticmethod(overwrite)

    def __init__(self, document, known, arrived, root="/"):
        super().__init__(document, root)
        self.fork, self.known, self.arrived = document["fork"], known, arrived
        self.stale = []

    def apply(self):
        started = time.monotonic()
        again = (self.bind_data_disk, self.data_disk) if self.fork.get("data_disk") == "bind" else ()
        self.run(self.entropy, self.clock, *again, self.data_folders, self.user, self.hostname, self.runtime_hostname,
                 self.machine_id, self.cover_ids, self.mac, self.keys, self.sshd, self.environment, self.dns,
                 self.known_ids, self.restart_sshd, self.mounts)
        return {"fresh": True, "stale": self.stale, **self.report(started)}

    def finish(self):
        """What nobody can tell from its not being done yet; after the answer."""
        self.run(self.network)

    def entropy(self):
        """Fresh randomness: two forks of one warm image must share no random stream."""
        if self.live:
            add_entropy(unb64(self.fork["entropy"]))

    def clock(self):
        if self.live and self.fork.get("clock_ns"):
            time.clock_settime_ns(time.CLOCK_REALTIME, self.fork["clock_ns"] + time.monotonic_ns() - self.arrived)

    def bind_data_disk(self):
        """The driver looks at the disk only now: what stood there at the freeze was another one."""
        for name in os.listdir("/sys/bus/virtio/devices") if self.live else ():
            folder = f"/sys/bus/virtio/devices/{name}"
            if read(f"{folder}/device") == b"0x0002\n" and not os.path.exists(f"{folder}/driver"):
                write_kernel("/sys/bus/virtio/drivers/virtio_blk/bind", name)

    def home(self, home, uid, gid):
        waiting = self.path(NEW_HOME)
        if os.path.isdir(waiting) and not os.path.exists(self.path(home)):
            os.makedirs(os.path.dirname(self.path(home)), exist_ok=True)
            os.rename(waiting, self.path(home))
            self.give(self.path(home), uid, gid)
        super().home(home, uid, gid)

    def machine_id(self):
        new, old = self.fork["machine_id"], (read(self.path("/etc/machine-id")) or b"").decode().strip()
        for path in ("/etc/machine-id", "/run/machine-id"):
            if os.path.exists(self.path(path)):
                self.put(path, new + "\n", 0o444)
        # journalctl takes journals below another machine's id for those of another machine; journald, which runs on,
        # knows them by the old name.
        for folder in ("/run/log/journal", "/var/log/journal"):
            if self.live and old != new and os.path.isdir(f"{folder}/{old}"):
                os.rename(f"{folder}/{old}", f"{folder}/{new}")
                os.symlink(new, f"{folder}/{old}")

    def cover_ids(self):
        if self.live:
            cover(BOOT_ID, self.fork["boot_id"] + "\n")
            if self.fork.get("uuid") and os.path.exists(PRODUCT_ID):
                cover(PRODUCT_ID, self.fork["uuid"] + "\n")

    def mac(self):
        if self.live and self.fork.get("mac"):
            for name in interfaces("device")[:1]:
                set_mac(name, bytes.fromhex(self.fork["mac"].replace(":", "")))

    def network(self):
        """IPv6's addresses are derived from the MAC, and come anew when the protocol is switched on."""
        for name in interfaces("device")[:1] if self.live and self.fork.get("mac") else ():
            switch = f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6"
            if read(switch) == b"0\n":
                write_kernel(switch, "1")
            if os.path.exists(switch):
                write_kernel(switch, "0")
        for name in interfaces("bridge") if self.live else ():
            set_mac(name, b"\x02\x42" + os.urandom(4))

    def known_ids(self):
        given = {"machine-id": self.fork["machine_id"], "boot-id": self.fork["boot_id"]}
        for name, known in self.known.items():
            fresh = os.urandom(16).hex()
            digits = given.get(name) or f"{fresh[:12]}4{fresh[13:16]}{'89ab'[int(fresh[16], 16) & 3]}{fresh[17:]}"
            try:
                complete = known.replace(digits.replace("-", ""))
            except OSError as error:
                log("known id", name, error)
                complete = False
            if not complete:
                self.stale.append(name)

"""Operations: files, mounts, disks, hardware, clock and ports of the running system."""

import _thread
import os
import time

from .binfmt import set_emulation
from .disks import grow_disks
from .files import write_atomic
from .hardware import settle_hardware
from .listeners import Listeners
from .mounts import MNT_DETACH, mount_9p, mounted_at, sys_umount
from .mountusers import mount_users
from .pins import Pins


class System:
    def __init__(self, channel, identity, options):
        self.channel, self.identity, self.options = channel, identity, options
        self.listeners = None  # a session asks for them
        self.pins = Pins()

    def report_listeners(self):
        changed = self.listeners.changed() if self.listeners is not None else None
        if changed is not None:
            self.channel.send({"event": "listeners", **changed})

    def op_listeners(self, message):
        self.listeners = Listeners(self.options["--root"])
        return {"ok": True, **self.listeners.changed()}

    def op_write_file(self, message):
        data = self.channel.collect(message)
        if data is not None:
            owner = tuple(message["owner"]) if message.get("owner") else None
            self.channel.answer_later(message["id"], lambda: {
                "changed": write_atomic(message["path"], data, message.get("mode", 0o644), owner)})

    def op_set_clock(self, message):
        """Nanoseconds since the epoch; small differences are left to settle by themselves."""
        off = message["time"] - time.time_ns()
        if abs(off) > 50_000_000:
            time.clock_settime_ns(time.CLOCK_REALTIME, message["time"])
        return {"ok": True, "off": off, "changed": abs(off) > 50_000_000}

    def op_mount(self, message):
        user = {**self.identity.user, **(message.get("user") or {})}

        def work():
            changed = mount_9p(message, user)
            _thread.start_new_thread(self.pins.fill, (message["target"],))
            return {"changed": changed}

        self.channel.answer_later(message["id"], work)

    def op_umount(self, message):
        def work():
            if mounted_at(message["target"]) is None:
                return {"changed": False}
            self.pins.release(message["target"])
            sys_umount(message["target"], MNT_DETACH if message.get("lazy") else 0)
            return {"changed": True}

        self.channel.answer_later(message["id"], work)

    def op_watch_mounts(self, message):
        """Answered when all is held, and a watcher that begins then hears of everything."""
        self.channel.answer_later(message["id"], lambda: {"held": self.pins.hold(message["targets"])})

    def op_changed(self, message):
        self.channel.answer_later(
            message["id"], lambda: {"shown": self.pins.changed(message["paths"], message["gone"])})

    def op_mount_users(self, message):
        self.channel.answer_later(message["id"], lambda: {"users": mount_users(message["targets"])})

    def op_grow(self, message):
        self.channel.answer_later(message["id"], grow_disks)

    def op_hardware(self, message):
        self.channel.answer_later(message["id"], lambda: settle_hardware(message["cpus"], message["memory"]))

    def op_emulation(self, message):
        self.channel.answer_later(message["id"], lambda: set_emulation(message["enabled"]))

    def op_shutdown(self, message):
        """Answer, then go down without waiting for anybody's leave."""
        import subprocess

        verb = "reboot" if message.get("reboot") else "poweroff"
        argv = ["systemctl", "--no-block", verb] if os.path.isdir("/run/systemd/system") else [verb]
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
        return {"ok": True}

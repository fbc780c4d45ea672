"""Operations: which machine this is, from the seed or told by the host, and what changes that."""

import _thread
import os

from .base import log, sha256, unb64
from .files import read
from .fork import Fork
from .freeze import Freezer
from .ids import KnownId
from .jsontext import parse_json, to_json
from .kernel import add_entropy
from .listeners import Listeners
from .personality import Personality
from .programs import processes
from .seed import load_seed, notify_ready, wait_until_writable


class Identity:
    def __init__(self, loop, options):
        self.loop, self.options = loop, options
        self.channel = None  # comes later than the seed begins
        self.applying = _thread.allocate_lock()
        self.seed = {"state": "pending"}
        self.env = {}  # of every command
        self.known = {}

    @property
    def user(self):
        return self.seed.get("user") or {}

    def apply_seed(self):
        """At our start, in a thread: the host may talk to us meanwhile, and hears when it is done."""
        try:
            wait_until_writable(self.options["--root"])
            raw = load_seed(self.options["--seed"])
            if raw is None:
                self.seed = {"state": "absent"}
            else:
                self.personalise(parse_json(raw), raw)
            Listeners(self.options["--root"]).remember_stale()
        except Exception as error:
            self.seed = {"state": "failed", "errors": [{"step": "seed", "message": f"{type(error).__name__}: {error}"}]}
            log("seed:", error)
        notify_ready()
        self.loop.post(self.seed_done)
        import subprocess  # noqa: F401 - now, so that the first command need not wait for it

    def seed_done(self):
        self.channel.send({"event": "seed", **self.seed})
        os.setpriority(os.PRIO_PROCESS, 0, 0)  # our unit starts us ahead of others; commands must not be

    def personalise(self, document, raw=None):
        with self.applying:
            if "fork" in document:
                fork = Fork(document, self.known, self.channel.arrived, self.options["--root"])
                report = fork.apply()
                _thread.start_new_thread(fork.finish, ())
            else:
                report = Personality(document, self.options["--root"]).apply(sha256(raw or to_json(document)))
        self.env = document.get("env") or {}
        state = "failed" if report["errors"] else "applied"
        self.seed = {"state": state, **report, "user": document.get("user")}
        return self.seed

    def op_apply(self, message):
        document = message["document"]
        if "fork" in document:  # here and now: until it is done nobody has anything else to ask
            return {"ok": True, "seed": self.personalise(document)}
        return self.channel.answer_later(message["id"], lambda: {"seed": self.personalise(document)})

    def op_freeze(self, message):
        def work():
            return Freezer(message["stage"], self.known).run()

        if message["stage"] in ("base", "runtime"):
            self.seed, self.env = {"state": "pending"}, {}
        self.channel.answer_later(message["id"], work)

    def op_track(self, message):
        """Learn where running programs keep the id that a file has; each fork gets another, see KnownId."""
        def work():
            digits = (read(message["file"]) or b"").decode().strip().replace("-", "")
            before = self.known.pop(message["name"], None)
            if before is not None:
                before.close()
            if len(digits) != 32 or digits.strip("0123456789abcdef"):
                return {"found": 0}
            pids = processes(lambda name: name == message["process"])
            self.known |= KnownId.find({message["name"]: digits}, pids, message["file"])
            return {"found": self.known[message["name"]].count}

        self.channel.answer_later(message["id"], work)

    def op_stir(self, message):
        add_entropy(unb64(message["entropy"]))
        return {"ok": True}

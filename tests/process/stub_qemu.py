"""A QEMU that is none: it reads the same command line and speaks QMP on the same sockets, and misbehaves on request.

Run as a program by the tests of this folder (see `write_stub`). What it does wrong is in the environment variable
QVM_STUB, words separated by spaces:

    abort             print two lines as QEMU does and abort, before any socket exists
    port-taken        print what QEMU prints for a taken hostfwd port, after the monitor's socket exists; exit 1
    slow              make the sockets half a second late
    mute              accept connections and never say a word
    garbage           greet with something that is not QMP
    deaf:COMMAND      never answer COMMAND
    babble:COMMAND    answer COMMAND with something that is not QMP
    die:COMMAND       end on COMMAND without an answer
    ignore-term       ignore SIGTERM
    ignore-powerdown  answer system_powerdown and stay
    old               call itself 6.2.0
    no-9p             have no virtio-9p-pci
    guest             have a guest: qvm's agent and an SSH server's greeting
    chance            abort as QEMU 10.0.2 does now and then, soon after its start, but not a second time
    chance-always     the same at every start
    crash             abort with other words soon after the start
    later:MANNER      MANNER (deaf, babble, die) from the second client on: the first is who waits for the start
    proof-ok proof-abort proof-internal-error proof-reset proof-silent     what the accelerator's proof sees
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

UUID_OF_NOBODY = "00000000-0000-0000-0000-000000000000"


def write_stub(folder: Path, name: str = "qemu-system-x86_64") -> Path:
    """An executable in `folder` that runs this stub with the Python of the tests."""
    path = folder / name
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{Path(__file__).resolve()}" "$@"\n')
    path.chmod(0o755)
    return path


class Stub:
    def __init__(self, argv: list[str], manners: list[str]) -> None:
        self.argv = argv
        self.manners = manners
        self.status = "running"
        self.clients = 0

    def does(self, manner: str) -> bool:
        return manner in self.manners or (self.clients > 1 and f"later:{manner}" in self.manners)

    def after(self, flag: str) -> str | None:
        return self.argv[self.argv.index(flag) + 1] if flag in self.argv else None

    def chardev(self, name: str) -> dict[str, str]:
        """The options of the chardev called `name`, {} where there is none."""
        for flag, value in pairwise(self.argv):
            if flag == "-chardev":
                head, *rest = value.split(",")
                options = dict(word.split("=", 1) for word in rest)
                if options.get("id") == name:
                    return options | {"kind": head}
        return {}

    def run(self) -> None:
        if self.does("ignore-term"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.does("abort"):
            print("qemu-system-x86_64: error: failed to set MSR 0x10a to 0x69", file=sys.stderr)
            print("qemu-system-x86_64: kvm.c:3183: Assertion `ret' failed.", file=sys.stderr, flush=True)
            os.abort()
        if self.after("-qmp") == "stdio":
            self.converse(sys.stdin.fileno(), sys.stdout.fileno())
        elif "fd" in self.chardev("monitor"):
            self.prove(int(self.chardev("monitor")["fd"]))
        else:
            self.serve()

    def serve(self) -> None:
        if self.does("slow"):
            time.sleep(0.5)
        listeners = {}
        guest = not self.crashes() and self.does("guest")
        if guest:
            from stub_guest import start_guest

            agent, stream = (Path(self.chardev(name)["path"]) for name in ("agent", "stream"))
            start_guest(agent, stream, self.after("-netdev") or "")
        for name in ("monitor",) if guest else ("agent", "stream", "monitor"):
            listeners[name] = socket.socket(socket.AF_UNIX)
            listeners[name].bind(self.chardev(name)["path"])
            listeners[name].listen(1)
        if self.does("port-taken"):
            time.sleep(0.1)
            print("qemu-system-x86_64: -netdev user,id=net0,hostfwd=tcp:127.0.0.1:22-:22: "
                  "Could not set up host forwarding rule 'tcp:127.0.0.1:22-:22'", file=sys.stderr, flush=True)
            sys.exit(1)
        with Path(self.chardev("console")["path"]).open("a") as console:
            console.write("stub: no guest here\n")
        while True:
            connection, _ = listeners["monitor"].accept()
            self.clients += 1
            with connection:
                try:
                    self.converse(connection.fileno(), connection.fileno())
                except (BrokenPipeError, ConnectionResetError):
                    continue  # the client has gone; the next one, as QEMU does

    def crashes(self) -> bool:
        """Whether this run is going to abort in a moment, before a guest could have spoken."""
        struck = Path(self.chardev("monitor")["path"]).with_name("struck")
        if self.does("crash"):
            words = "physmem.c:1: something_else: Assertion `true' failed."
        elif self.does("chance-always") or (self.does("chance") and not struck.exists()):
            words = "../../system/physmem.c:654: iotlb_to_section: Assertion `index < map->sections_nb' failed."
        else:
            return False
        struck.touch()

        def crash() -> None:
            print(f"qemu-system-x86_64: {words}", file=sys.stderr, flush=True)
            os.abort()

        threading.Timer(0.4, crash).start()  # the start has met the monitor by then
        return True

    def prove(self, fd: int) -> None:
        if self.does("proof-abort"):
            print("qemu-system-x86_64: error: KVM is not what it was", file=sys.stderr, flush=True)
            os.abort()
        if self.does("proof-reset"):
            sys.exit(0)
        if self.does("proof-ok"):
            print("[    0.5] something\r\nqvm-proof-ok\r", flush=True)
        if self.does("proof-internal-error"):
            self.status = "internal-error"
            self.send(fd, self.greeting())
            self.send(fd, {"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}})
            self.converse(fd, fd, greeted=True)
        time.sleep(60)

    def greeting(self) -> dict[str, Any]:
        major, minor = (6, 2) if self.does("old") else (7, 2)
        version = {"qemu": {"major": major, "minor": minor, "micro": 0}, "package": "stub"}
        return {"QMP": {"version": version, "capabilities": ["oob"]}}

    def send(self, fd: int, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\r\n"
        while data:
            data = data[os.write(fd, data):]

    def converse(self, read_fd: int, write_fd: int, *, greeted: bool = False) -> None:
        """One client, until it goes."""
        if self.does("mute"):
            time.sleep(60)
        if self.does("garbage"):
            os.write(write_fd, b"Segmentation fault: not really\nmore\n" * 3)
            time.sleep(60)
        if not greeted:
            self.send(write_fd, self.greeting())
        buffer = b""
        decoder = json.JSONDecoder()
        while chunk := os.read(read_fd, 65536):
            buffer += chunk
            while buffer.strip():
                try:
                    request, end = decoder.raw_decode(buffer.decode().lstrip())
                except ValueError:
                    break  # the rest is under way
                buffer = buffer.decode().lstrip()[end:].encode()
                self.answer(write_fd, request)

    def answer(self, fd: int, request: dict[str, Any]) -> None:
        command, arguments = request["execute"], request.get("arguments", {})
        if self.does(f"deaf:{command}"):
            time.sleep(60)
        if self.does(f"babble:{command}"):
            os.write(fd, b"}{ this is no JSON\r\n")
            return
        if self.does(f"die:{command}"):
            os._exit(1)
        reply: dict[str, Any] = {"id": request["id"]} if "id" in request else {}
        handler = getattr(self, "do_" + command.replace("-", "_"), None)
        if handler is None:
            self.send(fd, {"error": {"class": "CommandNotFound", "desc": f"no command {command}"}, **reply})
            return
        try:
            result = handler(fd, arguments)
        except LookupError as error:
            self.send(fd, {"error": {"class": "DeviceNotFound", "desc": str(error)}, **reply})
            return
        self.send(fd, {"return": result, **reply})
        if command == "quit" or (command == "system_powerdown" and not self.does("ignore-powerdown")):
            self.send(fd, {"event": "SHUTDOWN", "data": {"guest": command != "quit", "reason": command},
                           "timestamp": {"seconds": 1, "microseconds": 2}})
            time.sleep(0.05)
            os._exit(0)

    def do_qmp_capabilities(self, fd: int, arguments: dict[str, Any]) -> Any:
        return {}

    def do_query_uuid(self, fd: int, arguments: dict[str, Any]) -> Any:
        return {"UUID": self.after("-uuid") or UUID_OF_NOBODY}

    def do_query_status(self, fd: int, arguments: dict[str, Any]) -> Any:
        return {"status": self.status, "running": self.status == "running"}

    def do_system_powerdown(self, fd: int, arguments: dict[str, Any]) -> Any:
        return {}

    def do_quit(self, fd: int, arguments: dict[str, Any]) -> Any:
        return {}

    def do_stop(self, fd: int, arguments: dict[str, Any]) -> Any:
        self.status = "paused"
        return {}

    def do_cont(self, fd: int, arguments: dict[str, Any]) -> Any:
        self.status = "running"
        return {}

    def do_human_monitor_command(self, fd: int, arguments: dict[str, Any]) -> Any:
        return f"you said {arguments['command-line']}\r\n"

    def do_flood(self, fd: int, arguments: dict[str, Any]) -> Any:
        """`count` events with `size` bytes each, and only then the answer."""
        for number in range(arguments["count"]):
            self.send(fd, {"event": "FLOOD", "data": {"number": number, "filler": "x" * arguments["size"]},
                           "timestamp": {"seconds": 1, "microseconds": 2}})
        return {}

    def do_large(self, fd: int, arguments: dict[str, Any]) -> Any:
        return "x" * arguments["size"]

    def do_device_add(self, fd: int, arguments: dict[str, Any]) -> Any:
        return {}

    def do_device_del(self, fd: int, arguments: dict[str, Any]) -> Any:
        """Devices whose name begins with "stuck" stay; others go a moment later."""
        name = arguments["id"]
        if name.startswith("none"):
            raise LookupError(f"Device '{name}' not found")
        if not name.startswith("stuck"):
            for gone in (f"{name}-child", name):
                self.send(fd, {"event": "DEVICE_DELETED", "data": {"device": gone, "path": f"/machine/{gone}"},
                               "timestamp": {"seconds": 1, "microseconds": 2}})
        return {}

    def do_query_target(self, fd: int, arguments: dict[str, Any]) -> Any:
        return {"arch": "x86_64"}

    def do_device_list_properties(self, fd: int, arguments: dict[str, Any]) -> Any:
        if arguments["typename"] == "virtio-9p-pci" and self.does("no-9p"):
            raise LookupError("Device 'virtio-9p-pci' not found")
        return [{"name": "addr"}, {"name": "free-page-reporting"}]

    def do_qom_list_properties(self, fd: int, arguments: dict[str, Any]) -> Any:
        if arguments["typename"] == "hvf-accel":
            raise LookupError("Class 'hvf-accel' not found")
        return []

    def do_query_machines(self, fd: int, arguments: dict[str, Any]) -> Any:
        return [{"name": "pc-q35-7.2", "alias": "q35"}, {"name": "none"}]

    def do_query_qmp_schema(self, fd: int, arguments: dict[str, Any]) -> Any:
        return [{"name": "1", "meta-type": "enum", "values": ["user", "hubport", "stream"]},
                {"name": "2", "meta-type": "enum", "values": ["threads", "native"]},
                {"name": "3", "meta-type": "object", "members": []}]


if __name__ == "__main__":
    Stub(sys.argv[1:], os.environ.get("QVM_STUB", "").split()).run()

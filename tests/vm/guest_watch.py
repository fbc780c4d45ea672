"""Runs in the guest: tells what inotify reports below a folder, one line an event; "ready" first.

As real watchers do, it watches each folder, and looks for new ones where it hears of a change.
"""

import ctypes
import os
import struct
import sys

NAMES = {0x2: "MODIFY", 0x4: "ATTRIB", 0x8: "CLOSE_WRITE", 0x40: "MOVED_FROM", 0x80: "MOVED_TO", 0x100: "CREATE",
         0x200: "DELETE"}
EVENT = struct.Struct("iIII")
libc = ctypes.CDLL(None, use_errno=True)


def main(top):
    fd = libc.inotify_init1(0)
    known, trees = {}, {}

    def look(folder):
        for path, _, files in os.walk(folder):
            if path not in known.values():
                known[libc.inotify_add_watch(fd, os.fsencode(path), sum(NAMES))] = path
            trees[path] = set(files)

    look(top)
    print("ready", flush=True)
    while True:
        data, at = os.read(fd, 65536), 0
        while at < len(data):
            number, mask, _, length = EVENT.unpack_from(data, at)
            name = data[at + EVENT.size : at + EVENT.size + length].rstrip(b"\0").decode()
            at += EVENT.size + length
            path = f"{known[number]}/{name}" if name else known[number]
            words = "+".join(word for bit, word in NAMES.items() if mask & bit)
            print(words, os.path.relpath(path, top), flush=True)
            before = dict(trees)
            look(known[number])
            for folder, files in before.items():
                for gone in files - trees[folder]:
                    print("gone", os.path.relpath(f"{folder}/{gone}", top), flush=True)


main(sys.argv[1])

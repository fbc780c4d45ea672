"""Who keeps a mount from going."""

import os

from .files import read
from .mounts import mounted_at, unescape
from .programs import container_of


def mount_users(targets):
    """Who keeps these mounts from going: [{pid, comm, target, how, container}], one entry for a process and target.

    A mount namespace of its own (a container) that has the file system at another place, or does not follow ours,
    keeps it too; it is listed once, by its first process.
    """
    wanted = {os.stat(target).st_dev: target for target in targets if mounted_at(target)}
    numbers = {f"{os.major(number)}:{os.minor(number)}": number for number in wanted}
    ours, seen, users = os.stat("/proc/self/ns/mnt").st_ino, set(), []
    for pid in sorted(map(int, filter(str.isdigit, os.listdir("/proc")))):
        if pid == os.getpid():  # what we hold (pins.py) we let go
            continue
        folder, held = f"/proc/{pid}", {}
        try:
            space = os.stat(f"{folder}/ns/mnt").st_ino
            if not os.path.exists(f"{folder}/exe"):
                continue  # a thread of the kernel
            places = [*(f"{folder}/{name}" for name in ("cwd", "root", "exe")),
                      *(f"{folder}/fd/{name}" for name in os.listdir(f"{folder}/fd"))]
        except OSError:
            continue  # it has ended meanwhile
        for place in places:
            number = device_of(place)
            if number in wanted:
                held.setdefault(number, "fd" if "/fd/" in place else place.rpartition("/")[2])
        for line in (read(f"{folder}/maps") or b"").decode(errors="replace").splitlines():
            major, _, minor = line.split(" ", 4)[3].partition(":")
            number = os.makedev(int(major, 16), int(minor, 16))
            if number in wanted:
                held.setdefault(number, "map")
        if space not in seen:
            seen.add(space)
            for line in (read(f"{folder}/mountinfo") or b"").decode(errors="replace").splitlines():
                words = line.split(" ")
                number = numbers.get(words[2])
                at = unescape(words[4].encode()).decode(errors="replace")
                # Ours, and copies of it that go when it goes (mount_namespaces(7): shared with it, or its slaves).
                follows = at == wanted.get(number) and (space == ours or words[6].startswith(("master:", "shared:")))
                if number in wanted and not follows:
                    held.setdefault(number, f"mount {at}")
        users += [{"pid": pid, "comm": (read(f"{folder}/comm") or b"").decode(errors="replace").strip(),
                   "target": wanted[number], "how": how, "container": container_of(pid)}
                  for number, how in held.items()]
    return users


def device_of(path):
    try:
        return os.stat(path).st_dev
    except OSError:
        return None

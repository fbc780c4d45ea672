"""Ids that must not be the same in two machines, wherever they are kept."""

import os

from .files import overwrite, read
from .mounts import MS_BIND, sys_mount

BOOT_ID, PRODUCT_ID = "/proc/sys/kernel/random/boot_id", "/sys/class/dmi/id/product_uuid"


def forms_of(digits):
    """How programs keep an id of 128 bits: as bytes, as hexadecimal digits, as a UUID."""
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    return bytes.fromhex(digits), digits.encode(), "-".join(parts).encode()


TOP_BIT = bytes(number >> 7 for number in range(256))


def find_bytes(pid, patterns):
    """[[address, number of the pattern]] in the private memory that this process may write and has touched."""
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory, \
            open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pages:
        for line in maps.read().splitlines():
            bounds, rights = line.split(" ", 2)[:2]
            if rights != "rw-p":
                continue
            at, end = (int(word, 16) >> 12 for word in bounds.split("-"))
            # Bit 63 of a page's entry: present (admin-guide/mm/pagemap.rst). What is not was never written.
            present = os.pread(pages.fileno(), (end - at) * 8, at * 8)[7::8].translate(TOP_BIT)
            start = present.find(1)
            while start >= 0:
                stop = present.find(0, start)
                stop = len(present) if stop < 0 else stop
                data = os.pread(memory.fileno(), (stop - start) << 12, (at + start) << 12)
                for number, pattern in enumerate(patterns):
                    place = data.find(pattern)
                    while place >= 0:
                        found.append([((at + start) << 12) + place, number])
                        place = data.find(pattern, place + 1)
                start = present.find(1, stop)
    return found


class KnownId:
    """An id that running programs keep in memory. Where is found out before a freeze, and a fork writes another there:
    the alternative is to start them anew, which takes them seconds.
    """

    def __init__(self, digits, file=None):
        self.digits, self.file = digits, file
        self.places = []

    @classmethod
    def find(cls, wanted, pids, file=None):
        """{name: KnownId} of some ids (name -> digits), in one look through the memory of these processes."""
        known = {name: cls(digits, file) for name, digits in wanted.items()}
        forms = [form for digits in wanted.values() for form in forms_of(digits)]
        for pid in pids:
            found = find_bytes(pid, forms)
            for number, each in enumerate(known.values()):
                ours = [(at, form - 3 * number) for at, form in found if form // 3 == number]
                if ours:
                    # An open mem file stays that of this very process, whoever gets its pid later; of one that is gone
                    # it is empty.
                    each.places.append((os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC), ours))
        return known

    @property
    def count(self):
        return sum(len(found) for _, found in self.places)

    def close(self):
        for memory, _ in self.places:
            os.close(memory)

    def replace(self, digits):
        """True where each program that had it has the new one now."""
        old, new = forms_of(self.digits), forms_of(digits)
        complete = True
        for memory, found in self.places:
            gone, done = False, 0
            for at, form in found:
                there = os.pread(memory, len(old[form]), at)
                gone |= not there  # and whoever came after it has read the file
                if there == old[form]:
                    done += os.pwrite(memory, new[form], at)
            complete &= gone or done > 0
        if self.file and read(self.file) is not None:
            data = read(self.file)
            for before, after in ((old[1], new[1]), (old[2], new[2])):
                data = data.replace(before, after)
            overwrite(self.file, data, os.stat(self.file).st_mode & 0o7777)
        self.digits = digits
        return complete


def cover(path, text):
    """Show `text` in a file of the kernel's that says what cannot be changed."""
    ours = f"/run/qvm/{os.path.basename(path)}"
    overwrite(ours, text.encode(), os.stat(path).st_mode & 0o7777)
    if os.stat(path).st_dev == os.stat(os.path.dirname(path)).st_dev:
        sys_mount(ours, path, "none", MS_BIND, "")

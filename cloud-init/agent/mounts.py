"""Mounting: the system calls that `os` lacks, the list of mounts, and folders of the host."""

import errno
import os
import time

from .base import Failure
from .files import read
from .programs import run_program

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOATIME, MS_BIND = 1, 2, 4, 1024, 4096
MNT_DETACH = 2
PLUG_TIMEOUT = 10.0  # seconds until a device that the host plugs in is there


def libc_call(name, *args):
    import ctypes

    if not hasattr(libc_call, "libc"):
        libc_call.libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc_call.libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def sys_mount(source, target, kind, flags, options):
    from ctypes import c_ulong

    libc_call("mount", os.fsencode(source), os.fsencode(target), kind.encode(), c_ulong(flags), options.encode())


def sys_umount(target, flags=0):
    libc_call("umount2", os.fsencode(target), flags)


def mounted_at(target):
    """The type of the file system mounted at `target` itself, else None (fs/proc_namespace.c: octal escapes)."""
    found = None
    for line in (read("/proc/self/mounts") or b"").splitlines():
        words = line.split(b" ")
        if unescape(words[1]) == os.fsencode(target):
            found = words[2].decode()
    return found


def is_mount(path):
    """Whether another file system begins here: quicker than the list of mounts, but blind to a part of its own one."""
    return os.path.isdir(path) and os.stat(path).st_dev != os.stat(os.path.dirname(path) or "/").st_dev


def unescape(word):
    if b"\\" not in word:
        return word
    head, *parts = word.split(b"\\")
    return head + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in parts)


def wait_for_tag(tag):
    """Wait until the kernel has the 9p device of this tag.

    Mounting would load the driver, but the driver offers itself a moment before it has found its devices, and a mount
    in that moment fails with ENOENT; a device that is being plugged in comes later still.
    """
    drivers = "/sys/bus/virtio/drivers/9pnet_virtio"
    if not os.path.isdir(drivers):
        try:
            run_program(["modprobe", "-a", "9pnet_virtio", "9p"])
        except Failure as error:
            raise Failure(f"this image's kernel ({os.uname().release}) has no 9p, by which host folders are mounted: "
                          "use an image with the distribution's generic kernel, not its cloud kernel, or "
                          "--mount none and `qvm cp`") from error
    end = time.monotonic() + PLUG_TIMEOUT
    while True:
        found = [(read(f"{drivers}/{name}/mount_tag") or b"").rstrip(b"\0\n").decode() for name in os.listdir(drivers)]
        if tag in found:
            return
        if time.monotonic() > end:
            raise Failure(f"no 9p device with the tag {tag!r} appeared within {PLUG_TIMEOUT:g} s")
        time.sleep(0.005)


def cache_mode(release, shared):
    """9p's cache= for a kernel. What the host changes must be seen, also in files that are open here, and nobody's
    writes may be lost.

    Since Linux 6.4 every mode shows NUL bytes where the host has appended, but for `directio`, which sends reads and
    writes past the cache. Those with a cache for writing (mmap) also open files for appending without O_APPEND, and
    overwrite what others have appended meanwhile; without one, files cannot be mapped to be written to. Older kernels
    have neither fault with mmap.
    """
    version = tuple(int(part) for part in release.replace("-", ".").split(".")[:2])
    return "mmap,directio" if shared or version < (6, 4) else "readahead,directio"


def mount_9p(mount, user):
    """Mount a host folder; True where it was not. Folders made on the way inside the home are the user's."""
    tag, target = mount["tag"], mount["target"]
    if not target.startswith("/") or not os.path.normpath(target).strip("/"):
        raise Failure(f"{target!r} is no place for a mount")
    if is_mount(target) and mounted_at(target) == "9p":
        return False
    path = ""
    for part in target.strip("/").split("/"):
        path += "/" + part
        if not os.path.isdir(path):
            os.mkdir(path, 0o755)
            if user.get("home") and path.startswith(user["home"] + "/"):
                os.chown(path, int(user["uid"]), int(user["gid"]))
    flags = MS_NOSUID | MS_NODEV | (0 if mount.get("writable", True) else MS_RDONLY)
    cache = cache_mode(os.uname().release, shared=mount.get("mmap"))
    options = f"trans=virtio,version=9p2000.L,msize=512000,access=any,cache={cache}"
    try:
        sys_mount(tag, target, "9p", flags, options)
    except OSError:  # looking first costs as much as mounting; what is wrong is told by the second try
        wait_for_tag(tag)
        mount_plugged(tag, target, flags, options)
    return True


def mount_plugged(tag, target, flags, options):
    """sysfs shows a tag a moment before the driver has its device in the list that a mount looks through."""
    end = time.monotonic() + 1.0
    while True:
        try:
            sys_mount(tag, target, "9p", flags, options)
            return
        except OSError as error:
            if error.errno != errno.ENOENT or time.monotonic() > end:
                raise
        time.sleep(0.005)

"""Runs in the guest, in a folder of a mount: the hard cases of a file system. Prints JSON: case -> "ok" or why.

Written anew after the questions that pjdfstest asks, and those that databases and build tools depend on.
"""

import errno
import fcntl
import json
import mmap
import os
import sqlite3
import stat
import subprocess
import sys
import threading


def refused(number, function, *args, **options):
    try:
        function(*args, **options)
    except OSError as error:
        assert error.errno == number, error
        return
    raise AssertionError(f"not refused with {errno.errorcode[number]}")


def write(name, data=b"x"):
    with open(name, "wb") as file:
        file.write(data)
    return name


def read(name):
    with open(name, "rb") as file:
        return file.read()


def modes():
    write("mode")
    for mode in (0o644, 0o600, 0o755, 0o400, 0o1777, 0o000):
        os.chmod("mode", mode)
        assert stat.S_IMODE(os.stat("mode").st_mode) == mode, oct(mode)
    old = os.umask(0o027)
    os.close(os.open("masked", os.O_CREAT | os.O_WRONLY, 0o666))
    os.mkdir("masked.d", 0o777)
    os.umask(old)
    assert [stat.S_IMODE(os.stat(name).st_mode) for name in ("masked", "masked.d")] == [0o640, 0o750]


def owners():
    write("owned")
    os.chown("owned", 1234, 2345)
    assert (os.stat("owned").st_uid, os.stat("owned").st_gid) == (1234, 2345)


def links():
    write("one", b"1")
    os.link("one", "two")
    assert os.stat("two").st_nlink == 2 and os.path.samefile("one", "two")
    os.unlink("one")
    assert read("two") == b"1" and os.stat("two").st_nlink == 1
    os.symlink("nowhere/at all", "dangling")
    assert os.readlink("dangling") == "nowhere/at all" and not os.path.exists("dangling")
    refused(errno.EEXIST, os.symlink, "x", "dangling")
    refused(errno.EEXIST, os.link, "two", "dangling")
    os.symlink("loop", "loop")
    refused(errno.ELOOP, os.stat, "loop")


def renames():
    write("from", b"new")
    write("to", b"old")
    with open("to", "rb") as old:
        os.rename("from", "to")
        assert old.read() == b"old", "the file that was replaced is gone for who has it open"
    assert read("to") == b"new" and not os.path.exists("from")
    os.makedirs("d/full")
    os.mkdir("empty")
    refused(errno.ENOTEMPTY, os.rename, "empty", "d")
    refused(errno.EINVAL, os.rename, "d", "d/full/inside")
    refused(errno.EISDIR, os.rename, "to", "empty")
    refused(errno.ENOTDIR, os.rename, "empty", "to")
    os.rename("d", "empty")
    assert os.path.isdir("empty/full")


def unlink_while_open():
    write("open", b"still here")
    with open("open", "r+b") as file:
        os.unlink("open")
        assert file.read() == b"still here"
        file.write(b", and more")
        file.flush()
        assert os.fstat(file.fileno()).st_size == 20, "fstat after unlink"
        os.fchmod(file.fileno(), 0o600)


def mappings():
    write("mapped", b"\0" * 8192)
    with open("mapped", "r+b") as file, mmap.mmap(file.fileno(), 8192) as shared:
        shared[4096:4100] = b"page"
        shared.flush()
        file.seek(4096)
        assert file.read(4) == b"page"
        file.seek(0)
        file.write(b"head")
        file.flush()
    assert read("mapped")[:4] == b"head" and read("mapped")[4096:4100] == b"page"


def locks():
    write("locked")
    code = ("import fcntl,sys\nf=open('locked','r+')\n"
            "try: getattr(fcntl, sys.argv[1])(f, fcntl.LOCK_EX|fcntl.LOCK_NB)\nexcept OSError: sys.exit(3)\n")
    for kind in ("flock", "lockf"):
        with open("locked", "r+b") as file:
            getattr(fcntl, kind)(file, fcntl.LOCK_EX)
            assert subprocess.run([sys.executable, "-c", code, kind], check=False).returncode == 3, kind
            getattr(fcntl, kind)(file, fcntl.LOCK_UN)
            assert subprocess.run([sys.executable, "-c", code, kind], check=False).returncode == 0, kind


def appending():
    def append(letter):
        fd = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for _ in range(50):
            os.write(fd, letter * 100 + b"\n")
        os.close(fd)

    threads = [threading.Thread(target=append, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = read("log").splitlines()
    assert len(lines) == 150 and all(len(line) == 100 and len(set(line)) == 1 for line in lines), len(lines)


def sparse():
    with open("sparse", "wb") as file:
        file.seek(5 << 30)
        file.write(b"end")
    found = os.stat("sparse")
    assert found.st_size == (5 << 30) + 3, "a file over 4 GiB"
    assert found.st_blocks * 512 < 1 << 20, "holes are stored"
    with open("sparse", "rb") as file:
        file.seek((5 << 30) - 4)
        assert file.read() == b"\0\0\0\0end"
    os.truncate("sparse", 10)
    assert read("sparse") == b"\0" * 10


def attributes():
    write("attributed")
    os.setxattr("attributed", "user.qvm", b"value")
    assert os.getxattr("attributed", "user.qvm") == b"value" and os.listxattr("attributed") == ["user.qvm"]
    os.removexattr("attributed", "user.qvm")
    refused(errno.ENODATA, os.getxattr, "attributed", "user.qvm")


def names():
    os.mkdir("names")
    wanted = [b"n" * 255, b"\xff\xfe not utf-8 \xc0", "ünïcødé 漢字".encode(), b" spaces \t\n", b"-rf *", b"Case",
              b"case", b"colon:back\\slash"]
    for number, name in enumerate(wanted):
        write(b"names/" + name, str(number).encode())
    assert sorted(os.listdir(b"names")) == sorted(wanted)
    assert [read(b"names/" + name) for name in wanted] == [str(number).encode() for number in range(len(wanted))]
    refused(errno.ENAMETOOLONG, write, b"names/" + b"n" * 256)


def times():
    write("timed")
    os.utime("timed", (1_000_000_000, 1_111_111_111))
    assert (os.stat("timed").st_atime, os.stat("timed").st_mtime) == (1_000_000_000, 1_111_111_111)


def nanoseconds():
    write("nano")
    os.utime("nano", ns=(1, 1_234_567_891_123_456_789))
    assert os.stat("nano").st_mtime_ns == 1_234_567_891_123_456_789, os.stat("nano").st_mtime_ns


def errors():
    write("plain")
    os.mkdir("folder")
    refused(errno.ENOTDIR, os.stat, "plain/x")
    refused(errno.ENOENT, os.stat, "missing/x")
    refused(errno.EEXIST, os.mkdir, "folder")
    write("folder/x")
    refused(errno.ENOTEMPTY, os.rmdir, "folder")
    refused(errno.ENOTDIR, os.rmdir, "plain")
    refused(errno.EISDIR, os.unlink, "folder")
    refused(errno.EEXIST, os.open, "plain", os.O_CREAT | os.O_EXCL)
    refused(errno.ELOOP, os.open, os.symlink("plain", "link") or "link", os.O_NOFOLLOW)


def special():
    os.mkfifo("fifo")
    assert stat.S_ISFIFO(os.stat("fifo").st_mode)


def device_nodes():
    for kind, number in ((stat.S_IFCHR, os.makedev(1, 3)), (stat.S_IFBLK, os.makedev(8, 0))):
        try:
            os.mknod("node", kind | 0o666, number)
        except OSError:
            assert not os.path.lexists("node")
        else:
            raise AssertionError("a device node was made")


def setuid():
    write("suid")
    refused(errno.EPERM, os.chmod, "suid", 0o4755)
    refused(errno.EPERM, os.open, "born-suid", os.O_CREAT | os.O_WRONLY, 0o4755)
    assert not os.stat("suid").st_mode & stat.S_ISUID


def databases():
    for journal in ("delete", "wal"):
        with sqlite3.connect(f"{journal}.db") as base:
            assert base.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
            base.execute("create table t (a integer primary key, b blob)")
            base.executemany("insert into t values (?, ?)", ((number, b"b" * 2000) for number in range(200)))
        base.close()
        with sqlite3.connect(f"{journal}.db") as base:
            assert base.execute("select count(*), sum(length(b)) from t").fetchone() == (200, 400_000)
            assert base.execute("pragma integrity_check").fetchone() == ("ok",)
        base.close()


def many():
    os.mkdir("many")
    count = int(sys.argv[1])
    for number in range(count):
        os.close(os.open(f"many/{number:06}", os.O_CREAT | os.O_WRONLY, 0o644))
    assert sorted(os.listdir("many")) == [f"{number:06}" for number in range(count)]


CASES = (modes, owners, links, renames, unlink_while_open, mappings, locks, appending, sparse, attributes, names, times,
         nanoseconds, errors, special, device_nodes, setuid, databases, many)


def main():
    results = {}
    for case in CASES:
        os.mkdir(case.__name__)
        os.chdir(case.__name__)
        try:
            case()
            results[case.__name__] = "ok"
        except Exception as error:
            results[case.__name__] = f"{type(error).__name__}: {error} (line {error.__traceback__.tb_next.tb_lineno})"
        os.chdir("..")
    print(json.dumps(results))


main()

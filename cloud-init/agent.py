"""qvm's agent: the one program of qvm that runs inside a guest.

It applies the seed (who the instance is, its user, its disks), then serves two virtio-serial ports: the control
channel (JSON lines) and the byte streams (binary frames). Both protocols are described in qvm/guest/protocol.py.

One file and the standard library only, because it is baked into images, sent into running guests and injected into
cloud images whose Python nobody chose (3.9 or newer). Imports are few and late on purpose: under software emulation
each costs tens of milliseconds of every boot. One thread runs an epoll loop; whatever may block (file systems,
mounts) runs in a thread of its own and posts its answer back.

    agent.py [--control PATH|fd:N] [--streams PATH|fd:N] [--seed DEVICE|FILE|none] [--root DIR]
"""

# The C halves of `socket`, `threading`, `collections` and `struct` are all we need: importing their Python halves costs
# 170 ms of every boot under software emulation, and `json` another 300 ms (for `re`).
import _socket as socket
import _struct as struct
import _thread
import binascii
import errno
import os
import select
import sys
import time
from _collections import deque

VERSION = 1
CONTROL_PORT, STREAM_PORT = "org.qvm.agent", "org.qvm.stream"
MAX_LINE = 2 << 20  # a control message of 1 MiB in base64, with room for its frame
CHUNK = 64 << 10
OUTPUT_WINDOW = 1 << 20  # bytes of a command's output sent but not yet acknowledged
STREAM_WINDOW = 512 << 10
OUTBOX_FULL = 256 << 10  # above this a port takes no more from commands or sockets
OUTBOX_LOST = 8 << 20  # above this nobody is reading: the session is dropped
STDIN_MARK = b',"op":"stdin","data":"'
TICK = 0.2
PLUG_TIMEOUT = 10.0  # seconds until a device that the host plugs in is there
STATE_FOLDER = "/etc/qvm"
GATEWAY, NAMESERVER = "10.0.2.2", "10.0.2.3"  # QEMU's user network
DATA_FOLDER = "/var/lib/qvm"  # where the data disk is mounted
SERVICE_DROP_IN = "/etc/systemd/system/service.d/10-qvm-environment.conf"
SERVICE_ENVIRONMENT = f"[Service]\nEnvironmentFile=-{STATE_FOLDER}/environment\n".encode()


def log(*words):
    print("qvm-agent:", *words, file=sys.stderr, flush=True)


def b64(data):
    return binascii.b2a_base64(data, newline=False).decode()


def unb64(text):
    return binascii.a2b_base64(text)


try:
    import _json

    class _Context:
        strict, memo = True, {}
        object_hook = object_pairs_hook = None
        parse_float, parse_int, parse_constant = float, int, float

    _scan = _json.make_scanner(_Context)
    _encode = _json.make_encoder(None, None, _json.encode_basestring_ascii, None, ":", ",", False, False, True)

    def parse_json(data):
        """ValueError for what is no JSON, or more than one value."""
        text = str(data, "utf-8").strip()
        try:
            value, end = _scan(text, 0)
        except (StopIteration, SystemError):  # the latter where the C code misses its exception's Python half
            raise ValueError("no JSON") from None
        if end != len(text):
            raise ValueError("more than one JSON value")
        return value

    def to_json(value):
        return "".join(_encode(value, 0)).encode()

    if parse_json(to_json({"a": [1, "é", None, True]})) != {"a": [1, "é", None, True]}:
        raise ImportError("_json is not as it was")
except (ImportError, AttributeError, TypeError):
    import json

    def parse_json(data):
        return json.loads(data)

    def to_json(value):
        return json.dumps(value, separators=(",", ":")).encode()


def sha256(data):
    try:
        from _sha2 import sha256 as new  # hashlib itself loads OpenSSL, which costs more than all our imports
    except ImportError:
        try:
            from _sha256 import sha256 as new
        except ImportError:
            from hashlib import sha256 as new
    return new(data).hexdigest()


def read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


class Failure(Exception):
    """Something the host asked for cannot be done; the text goes back to it."""


# --- system calls that `os` lacks ------------------------------------------------------------------------------------

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOATIME, MS_BIND = 1, 2, 4, 1024, 4096
MNT_DETACH = 2
EXT4_IOC_RESIZE_FS = 0x40086610  # _IOW('f', 16, __u64), fs/ext4/ext4.h
BLKGETSIZE64 = 0x80081272
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207  # random(4)
TIOCSWINSZ, TIOCSCTTY = 0x5414, 0x540E  # asm-generic/ioctls.h


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


# --- block devices and the seed --------------------------------------------------------------------------------------


def find_disk(serial):
    """/dev/vdX of the virtio disk with that serial; from sysfs, so that nothing waits for udev."""
    for name in sorted(os.listdir("/sys/block")):
        if (read(f"/sys/block/{name}/serial") or b"").strip() == serial.encode():
            return f"/dev/{name}"
    return None


def device_size(fd):
    import fcntl

    size = os.fstat(fd).st_size
    if size:
        return size  # a plain file, in tests
    return struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0]


def read_iso_file(path, name):
    """A file of an ISO 9660 image's root directory by its plain name (ECMA-119 8.4, 9.1); None without it.

    Read straight from the disk: mounting would load a module and leave something to unmount.
    """
    with open(path, "rb") as disk:
        disk.seek(16 * 2048)
        descriptor = disk.read(2048)
        if descriptor[:6] != b"\x01CD001":
            return None
        start, size = struct.unpack_from("<I", descriptor, 158)[0], struct.unpack_from("<I", descriptor, 166)[0]
        disk.seek(start * 2048)
        folder, at = disk.read(size), 0
        while at < size:
            length = folder[at]
            if length == 0:  # records do not cross sectors: the rest of this one is padding
                at = (at // 2048 + 1) * 2048
                continue
            label = folder[at + 33 : at + 33 + folder[at + 32]]
            if label.split(b";")[0] == name.encode():
                disk.seek(struct.unpack_from("<I", folder, at + 2)[0] * 2048)
                return disk.read(struct.unpack_from("<I", folder, at + 10)[0])
            at += length
    return None


def load_seed(where):
    """The seed document's bytes, or None where there is no seed disk."""
    if where == "none":
        return None
    device = where or find_disk("seed")
    if device is None and os.path.exists("/dev/disk/by-label/cidata"):
        device = "/dev/disk/by-label/cidata"
    if device is None:
        return None
    if device.endswith(".json"):
        return read(device)
    return read_iso_file(device, "QVM.JSON")


class Ext4:
    """What the superblock says (fs/ext4/ext4.h, struct ext4_super_block)."""

    def __init__(self, block):
        low, self.state = struct.unpack_from("<I", block, 4)[0], struct.unpack_from("<H", block, 0x3A)[0]
        high = struct.unpack_from("<I", block, 0x150)[0] if struct.unpack_from("<I", block, 0x60)[0] & 0x80 else 0
        self.block_size = 1024 << struct.unpack_from("<I", block, 0x18)[0]
        self.blocks = low | high << 32

    @classmethod
    def find(cls, device):
        with open(device, "rb", buffering=0) as disk:
            disk.seek(1024)
            block = disk.read(1024)
        return cls(block) if block[0x38:0x3A] == b"\x53\xef" else None


def is_blank(device):
    """Whether the first and last MiB hold nothing: stricter than a list of signatures, and no program to run."""
    fd = os.open(device, os.O_RDONLY)
    try:
        size = device_size(fd)
        span = min(1 << 20, size)
        return not os.pread(fd, span, 0).strip(b"\0") and not os.pread(fd, span, size - span).strip(b"\0")
    finally:
        os.close(fd)


def grow_ext4(device, mountpoint):
    """Grow a mounted ext4 to its device, as resize2fs does; True where it grew."""
    import fcntl

    system = Ext4.find(device)
    if system is None:
        return False
    fd = os.open(device, os.O_RDONLY)
    wanted = device_size(fd) // system.block_size
    os.close(fd)
    # Less than a block group more is not worth a group of its own.
    if wanted - system.blocks < 8 * system.block_size:
        return False
    fd = os.open(mountpoint, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, EXT4_IOC_RESIZE_FS, struct.pack("Q", wanted))
    finally:
        os.close(fd)
    return True


# --- applying the seed -----------------------------------------------------------------------------------------------


def run_program(argv):
    """Run a program to its end; Failure with its last words. By hand, because subprocess is not imported this early."""
    reading, writing = os.pipe()
    actions = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), (os.POSIX_SPAWN_DUP2, writing, 1),
               (os.POSIX_SPAWN_DUP2, writing, 2)]
    pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions)
    os.close(writing)
    with open(reading, "rb") as output:
        words = output.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise Failure(f"{argv[0]} ended with {code}: {words.decode(errors='replace').strip()[-500:]}")


def write_atomic(path, data, mode=0o644, owner=None):
    """Replace a file whole; True where the content, mode or owner were different before."""
    if os.path.lexists(path) and not os.path.islink(path):
        old = os.stat(path)
        same_owner = owner is None or (old.st_uid, old.st_gid) == owner
        if old.st_mode & 0o7777 == mode and same_owner and old.st_size == len(data) and read(path) == data:
            return False
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.qvm-{os.getpid()}-{_thread.get_ident()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
            if owner is not None:
                os.fchown(file.fileno(), *owner)
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    return True


def overwrite(path, data, mode=0o644, owner=None):
    """As write_atomic, but into the file that is there, which spares a new inode, a rename and their blocks. Only where
    nobody reads along: in a fork that nobody has got yet. A crash may lose it; the next start applies the seed anew.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return write_atomic(path, data, mode, owner)
    try:
        old = os.fstat(fd)
        changed = old.st_size != len(data) or os.pread(fd, len(data), 0) != data
        if changed:
            os.pwrite(fd, data, 0)
            if old.st_size > len(data):
                os.ftruncate(fd, len(data))
        if old.st_mode & 0o7777 != mode:
            os.fchmod(fd, mode)
        if owner is not None and (old.st_uid, old.st_gid) != owner:
            os.fchown(fd, *owner)
    finally:
        os.close(fd)
    return changed


def grow_root():
    number = os.stat("/").st_dev
    folder = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    whole = os.path.isdir(folder) and not os.path.exists(f"{folder}/partition")
    return whole and grow_ext4(f"/dev/{os.path.basename(folder)}", "/")


class Personality:
    """Applies a seed document to the system under `root`; every step stands alone, so one that fails stops no other."""

    write = staticmethod(write_atomic)

    def __init__(self, document, root="/"):
        self.doc = document
        self.root = root.rstrip("/")
        self.live = not self.root  # a scratch root (tests) gets files only
        self.errors = []
        self.timings = {}
        self.sshd_changed = False

    def path(self, path):
        return self.root + path

    def put(self, path, text, mode=0o644, owner=None):
        data = text if isinstance(text, bytes) else text.encode()
        return self.write(self.path(path), data, mode, owner if self.live else None)

    def put_block(self, path, lines):
        """Keep our lines, and only ours, between two marks in a file that others write too."""
        begin, end = "# qvm begin", "# qvm end"
        old = (read(self.path(path)) or b"").decode(errors="surrogateescape").splitlines()
        if begin in old and end in old:
            old[old.index(begin) : old.index(end) + 1] = []
        text = "".join(line + "\n" for line in [*old, begin, *lines, end])
        return self.put(path, text.encode(errors="surrogateescape"))

    def apply(self, raw_digest):
        """Run every step; those that touch only the root disk are left out when this very document was applied."""
        stamp = self.path(f"{STATE_FOLDER}/applied")
        mark = f"{self.doc.get('instance_id', '')} {raw_digest}\n".encode()
        fresh = read(stamp) != mark
        once = (self.hostname, self.machine_id, self.user, self.keys, self.sshd, self.environment, self.dns)
        always = (self.runtime_hostname, self.grow_root, self.data_disk, self.data_folders, self.mounts)
        started = time.monotonic()
        self.run(*(once if fresh else ()), *always, self.restart_sshd)
        if fresh and not self.errors:
            self.put(f"{STATE_FOLDER}/applied", mark)
        return {"fresh": fresh, **self.report(started)}

    def report(self, started):
        return {"instance_id": self.doc.get("instance_id"), "errors": self.errors,
                "seconds": round(time.monotonic() - started, 4), "timings": self.timings}

    def run(self, *steps):
        for step in steps:
            begun = time.monotonic()
            try:
                step()
            except (OSError, Failure, KeyError, ValueError, TypeError) as error:
                self.errors.append({"step": step.__name__, "message": f"{type(error).__name__}: {error}"})
                log("seed step", step.__name__, "failed:", error)
            self.timings[step.__name__] = round(time.monotonic() - begun, 4)

    def hostname(self):
        name = self.doc.get("hostname")
        if not name:
            return
        self.put("/etc/hostname", name + "\n")
        names = self.doc.get("hosts") or {"host.docker.internal": GATEWAY, "host.qvm.internal": GATEWAY}
        self.put_block("/etc/hosts", [f"127.0.1.1 {name}", *(f"{address} {host}" for host, address in names.items())])

    def runtime_hostname(self):
        name = self.doc.get("hostname")
        if name and self.live and os.uname().nodename != name:
            socket.sethostname(name)

    def machine_id(self):
        if self.doc.get("machine_id"):
            self.put("/etc/machine-id", self.doc["machine_id"] + "\n", 0o444)

    def user(self):
        """The user, in the account files themselves: useradd and friends cost more than the whole rest of this."""
        user = self.doc.get("user")
        if not user:
            return
        name, uid, gid, home = user["name"], int(user["uid"]), int(user["gid"]), user["home"]
        if uid == 0:
            return
        shell = user.get("shell", "/bin/bash")
        if not os.path.exists(self.path(shell)):
            shell = "/bin/sh"
        groups = self.table("/etc/group")
        if not any(row[2] == str(gid) for row in groups):
            free = name if all(row[0] != name for row in groups) else f"{name}-qvm"
            groups.append([free, "x", str(gid), ""])
        for row in groups:
            if row[0] in ("docker", "sudo") and name not in row[3].split(","):
                row[3] = ",".join([*filter(None, row[3].split(",")), name])
        accounts = self.table("/etc/passwd")
        for row in accounts:
            if row[0] == name and int(row[2]) < 1000 and int(row[2]) != uid:
                raise Failure(f"{name!r} is a system account of this image")
        # First in the file, so that the uid has this name even where the image gave it to another.
        ours = [name, "x", str(uid), str(gid), "", home, shell]
        accounts = [row for row in accounts if row[0] != name]
        at = next((n for n, row in enumerate(accounts) if row[2] == str(uid)), len(accounts))
        accounts.insert(at, ours)
        shadow = self.table("/etc/shadow")
        if all(row[0] != name for row in shadow):
            shadow.append([name, "*", "19000", "0", "99999", "7", "", "", ""])
        self.put_table("/etc/group", groups)
        self.put_table("/etc/shadow", shadow)
        self.put_table("/etc/passwd", accounts)
        for path in ("/etc/subuid", "/etc/subgid"):
            rows = self.table(path)
            if all(row[0] != name for row in rows):
                start = max([100000, *(int(row[1]) + int(row[2]) for row in rows)])
                self.put_table(path, [*rows, [name, str(start), "65536"]])
        self.put("/etc/sudoers.d/90-qvm", f"{name} ALL=(ALL:ALL) NOPASSWD:ALL\n", 0o440)
        self.home(home, uid, gid)

    def home(self, home, uid, gid):
        target = self.path(home)
        if os.path.isdir(target):
            return
        os.makedirs(target, 0o755)
        for folder, _, names in os.walk(self.path("/etc/skel")):
            into = target + folder[len(self.path("/etc/skel")) :]
            os.makedirs(into, exist_ok=True)
            for each in names:
                write_atomic(f"{into}/{each}", read(f"{folder}/{each}") or b"")
        self.give(target, uid, gid)

    def give(self, home, uid, gid):
        for folder, _, names in os.walk(home) if self.live and os.stat(home).st_uid != uid else ():
            for each in (folder, *(f"{folder}/{leaf}" for leaf in names)):
                os.chown(each, uid, gid, follow_symlinks=False)

    def table(self, path):
        text = (read(self.path(path)) or b"").decode(errors="surrogateescape")
        return [line.split(":") for line in text.splitlines() if line.strip()]

    def put_table(self, path, rows):
        old = os.stat(self.path(path)) if os.path.exists(self.path(path)) else None
        mode = old.st_mode & 0o7777 if old else 0o640 if path.endswith("shadow") else 0o644
        text = "".join(":".join(row) + "\n" for row in rows)
        self.put(path, text.encode(errors="surrogateescape"), mode, (old.st_uid, old.st_gid) if old else None)

    def keys(self):
        """Authorised keys live outside the home: a home mounted from the host must not be written to."""
        user, lines = self.doc.get("user") or {"name": "root"}, self.doc.get("authorized_keys") or []
        if not lines:
            return
        self.put(f"/etc/ssh/authorized_keys.d/{user['name']}", "".join(line.strip() + "\n" for line in lines))
        for folder in ("/etc/ssh", "/etc/ssh/authorized_keys.d"):
            if os.stat(self.path(folder)).st_mode & 0o7777 != 0o755:
                os.chmod(self.path(folder), 0o755)

    def sshd(self):
        if not self.doc.get("host_key"):
            return
        folder, ours = "/etc/ssh", "ssh_host_ed25519_key"
        changed = self.put(f"{folder}/{ours}", self.doc["host_key"], 0o600, (0, 0))
        self.put(f"{folder}/{ours}.pub", self.doc.get("host_key_public", "").strip() + "\n")
        for name in os.listdir(self.path(folder)):
            if name.startswith("ssh_host_") and name not in (ours, f"{ours}.pub"):
                os.unlink(self.path(f"{folder}/{name}"))
        root = (self.doc.get("user") or {}).get("name", "root") == "root"
        changed |= self.put(f"{folder}/sshd_config.d/10-qvm.conf", "\n".join((
            f"HostKey {folder}/{ours}",
            f"AuthorizedKeysFile {folder}/authorized_keys.d/%u .ssh/authorized_keys",
            "PermitRootLogin " + ("prohibit-password" if root else "no"),
            "PasswordAuthentication no", "KbdInteractiveAuthentication no", "GSSAPIAuthentication no",
            "UseDNS no", "PrintMotd no", "PrintLastLog no", "AcceptEnv LANG LC_* COLORTERM NO_COLOR QVM_*",
            "MaxSessions 100", "MaxStartups 100:30:200", "AllowStreamLocalForwarding yes", "AllowTcpForwarding yes",
            "ClientAliveInterval 30", "ClientAliveCountMax 4", "")))
        self.sshd_changed = changed

    def restart_sshd(self):
        """sshd that already runs starts itself anew on SIGHUP (sshd(8)), whatever init the guest has."""
        pid = read("/run/sshd.pid") if self.sshd_changed and self.live else None
        if pid:
            os.kill(int(pid), 1)

    def environment(self):
        env = self.doc.get("env") or {}
        quoted = {name: value.replace("\\", "\\\\").replace('"', '\\"') for name, value in env.items()}
        shell = {name: "'" + value.replace("'", "'\\''") + "'" for name, value in env.items()}
        self.put(f"{STATE_FOLDER}/environment", "".join(f'{name}="{value}"\n' for name, value in quoted.items()))
        self.put("/etc/profile.d/qvm.sh", "".join(f"export {name}={value}\n" for name, value in shell.items()))
        if env or os.path.exists(self.path("/etc/environment")):
            # pam_env knows no escapes, only a pair of quotes around the whole.
            simple = {name: value for name, value in env.items() if "\n" not in value}
            self.put_block("/etc/environment", [f'{name}="{value}"' for name, value in simple.items()])
        changed = self.put(SERVICE_DROP_IN, SERVICE_ENVIRONMENT)
        if changed and env and self.live and os.path.isdir("/run/systemd/system"):
            # systemd reads drop-ins when it loads units, which it has done for this boot; reloading takes seconds.
            run_program(["systemctl", "set-environment", *(f"{name}={value}" for name, value in env.items())])

    def dns(self):
        servers = self.doc.get("dns") or [NAMESERVER]
        self.put("/etc/resolv.conf", "".join(f"nameserver {server}\n" for server in servers))

    def grow_root(self):
        if self.live:
            grow_root()

    def data_disk(self):
        device = find_disk("data") if self.live and self.doc.get("data_disk", True) else None
        target = DATA_FOLDER
        if device is None or mounted_at(target):
            return
        system = Ext4.find(device)
        if system is None:
            if not is_blank(device):
                raise Failure(f"{device} (the data disk) holds something that is not ext4; it was left untouched")
            run_program(["mkfs.ext4", "-q", "-F", "-L", "qvm-data", "-m", "0", *MKFS_OPTIONS, device])
        elif system.state & 2:  # EXT4_ERROR_FS: the kernel met an error earlier
            run_program(["sh", "-c", f"e2fsck -p {device}; test $? -le 1"])
        os.makedirs(target, exist_ok=True)
        sys_mount(device, target, "ext4", MS_NOATIME, "discard,noinit_itable")
        grow_ext4(device, target)

    def data_folders(self):
        if not (self.live and is_mount(DATA_FOLDER)):
            return
        for folder in self.doc.get("data_folders") or []:
            if is_mount(folder):
                continue
            source = DATA_FOLDER + folder
            os.makedirs(folder, exist_ok=True)
            if not os.path.isdir(source):
                os.makedirs(source)
                old = os.stat(folder)
                os.chmod(source, old.st_mode & 0o7777)
                os.chown(source, old.st_uid, old.st_gid)
            sys_mount(source, folder, "none", MS_BIND, "")

    def mounts(self):
        user = self.doc.get("user") or {}
        for mount in (self.doc.get("mounts") or []) if self.live else []:
            try:
                mount_9p(mount, user)
            except (OSError, Failure) as error:
                self.errors.append({"step": f"mount {mount.get('target')}", "message": str(error)})


# The disk was proven blank, so nothing need be zeroed or discarded. All metadata lies together: strewn over the disk as
# by default it touches 67 tables of a qcow2 of 100 GiB instead of 12. Growing works without a resize inode (the kernel
# goes over to meta_bg), tried from 10 GiB to 1 TiB.
MKFS_OPTIONS = ("-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1,packed_meta_blocks=1", "-O", "^resize_inode")


def wait_for_tag(tag):
    """Wait until the kernel has the 9p device of this tag.

    Mounting would load the driver, but the driver offers itself a moment before it has found its devices, and a mount
    in that moment fails with ENOENT; a device that is being plugged in comes later still.
    """
    drivers = "/sys/bus/virtio/drivers/9pnet_virtio"
    if not os.path.isdir(drivers):
        run_program(["modprobe", "9pnet_virtio"])
    end = time.monotonic() + PLUG_TIMEOUT
    while True:
        found = [(read(f"{drivers}/{name}/mount_tag") or b"").rstrip(b"\0\n").decode() for name in os.listdir(drivers)]
        if tag in found:
            return
        if time.monotonic() > end:
            raise Failure(f"no 9p device with the tag {tag!r} appeared within {PLUG_TIMEOUT:g} s")
        time.sleep(0.005)


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
    # What the host changes must be seen, also in files that are open here: since Linux 6.4 every cache mode, mmap
    # included, shows NUL bytes where the host has appended. `directio` sends reads and writes past the cache and
    # leaves it to shared mappings, which cache=none would refuse; older kernels do just that and ignore the word.
    cache = mount.get("cache", "mmap,directio")
    options = f"trans=virtio,version=9p2000.L,msize=512000,access=any,cache={cache}"
    try:
        sys_mount(tag, target, "9p", flags, options)
    except OSError:  # looking first costs as much as mounting; what is wrong is told by the second try
        wait_for_tag(tag)
        sys_mount(tag, target, "9p", flags, options)
    return True


# --- frozen machines and their forks ---------------------------------------------------------------------------------

BOOT_ID, PRODUCT_ID = "/proc/sys/kernel/random/boot_id", "/sys/class/dmi/id/product_uuid"
FORK_MODULES = ("9p", "9pnet_virtio", "overlay", "bridge", "br_netfilter", "veth")
NEW_HOME = "/home/.qvm"  # a home that waits for its user
# What a fork writes. That the files are there already makes it cheap, see overwrite().
FORK_FILES = {
    "/etc/hostname": 0o644, "/etc/hosts": 0o644, "/etc/resolv.conf": 0o644, "/etc/environment": 0o644,
    "/etc/subuid": 0o644, "/etc/subgid": 0o644, "/etc/sudoers.d/90-qvm": 0o440, "/etc/profile.d/qvm.sh": 0o644,
    "/etc/qvm/environment": 0o644, "/etc/ssh/ssh_host_ed25519_key": 0o600, "/etc/ssh/ssh_host_ed25519_key.pub": 0o644,
    "/etc/ssh/sshd_config.d/10-qvm.conf": 0o644,
}
SIOCSIFHWADDR = 0x8924


def forms_of(digits):
    """How programs keep an id of 128 bits: as bytes, as hexadecimal digits, as a UUID."""
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    return bytes.fromhex(digits), digits.encode(), "-".join(parts).encode()


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
            present = bytes(top >> 7 for top in os.pread(pages.fileno(), (end - at) * 8, at * 8)[7::8])
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


def processes(wanted):
    """The pids whose name (comm) `wanted` says yes to."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if wanted((read(f"/proc/{pid}/comm") or b"").decode(errors="replace").strip()):
            found.append(int(pid))
    return found


def add_entropy(seed):
    """Have the kernel's random numbers go on from here: whoever was frozen in the same state goes on another way."""
    import fcntl

    with open("/dev/urandom", "wb", buffering=0) as device:
        fcntl.ioctl(device, RNDADDENTROPY, struct.pack("ii", 8 * len(seed), len(seed)) + seed)
        fcntl.ioctl(device, RNDRESEEDCRNG)


class KnownId:
    """An id that running programs keep in memory. Where is found out before a freeze, and a fork writes another there:
    the alternative is to start them anew, which takes them seconds.
    """

    def __init__(self, digits, pids, file=None):
        self.digits, self.file = digits, file
        forms = forms_of(digits)
        # An open mem file stays that of this very process, whoever gets its pid later; of one that is gone it is empty.
        self.places = [(os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC), found)
                       for pid in pids for found in [find_bytes(pid, forms)] if found]

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


def interfaces(kind):
    """Network interfaces with this entry in sysfs: `device` for real ones, `bridge`."""
    return [name for name in os.listdir("/sys/class/net") if os.path.exists(f"/sys/class/net/{name}/{kind}")]


def set_mac(name, mac):
    """While the interface is up; virtio_net and bridges allow that."""
    import fcntl

    some = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        fcntl.ioctl(some.fileno(), SIOCSIFHWADDR, struct.pack("16sH6s8x", name.encode(), 1, mac))
    finally:
        some.close()


def write_kernel(path, text):
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


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


class Freezer:
    """Makes a machine ready to be frozen and forked: what each fork would do alike is done once, and what it should
    not share goes. Stage `running` is a machine that somebody uses, about to be copied: nothing is taken from it.
    """

    def __init__(self, stage, known):
        self.stage, self.known = stage, known

    def run(self):
        steps = (self.know_ids, self.sync)
        if self.stage != "running":
            steps = (self.load, self.forget, self.prepare, self.units, self.quiet_network, self.rehearse,
                     *((self.unbind_data_disk,) if self.stage == "base" else ()), *steps)
        timings = {}
        for step in steps:
            begun = time.monotonic()
            step()
            timings[step.__name__] = round(time.monotonic() - begun, 4)
        return {"timings": timings}

    @staticmethod
    def load():
        missing = [name for name in FORK_MODULES if not os.path.isdir(f"/sys/module/{name}")]
        if missing:
            run_program(["modprobe", "-a", *missing])

    @staticmethod
    def forget():
        folder = "/etc/ssh"
        names = os.listdir(folder) if os.path.isdir(folder) else ()
        gone = [f"{folder}/{name}" for name in names if name.startswith("ssh_host_")]
        for path in (*gone, "/var/lib/systemd/random-seed", f"{STATE_FOLDER}/applied"):
            if os.path.exists(path):
                os.unlink(path)

    @staticmethod
    def prepare():
        for path, mode in FORK_FILES.items():
            if not os.path.lexists(path):
                write_atomic(path, b"\n", mode)
        os.makedirs("/etc/ssh/authorized_keys.d", 0o755, exist_ok=True)
        os.makedirs("/run/qvm", 0o755, exist_ok=True)
        for path in (BOOT_ID, PRODUCT_ID):
            if os.path.exists(path):
                cover(path, read(path).decode())
        Personality({}).home(NEW_HOME, 1000, 1000)
        # Reading and writing brings into memory what the file system needs for it.
        for path in (*FORK_FILES, "/etc/passwd", "/etc/group", "/etc/shadow"):
            read(path)
        for folder in ("/", "/mnt", "/home", "/etc/ssh/authorized_keys.d"):
            if os.path.isdir(folder):
                os.mkdir(f"{folder}/.qvm-new")
                os.rmdir(f"{folder}/.qvm-new")

    @staticmethod
    def units():
        """Services get the environment by a drop-in; systemd must have read it, which takes it long."""
        if write_atomic(SERVICE_DROP_IN, SERVICE_ENVIRONMENT) and os.path.isdir("/run/systemd/system"):
            run_program(["systemctl", "daemon-reload"])

    @staticmethod
    def quiet_network():
        for name in interfaces("device")[:1]:
            # A fork that gets another MAC must say so, or the host's side of the network goes on with the old one.
            write_kernel(f"/proc/sys/net/ipv4/conf/{name}/arp_notify", "1")
            if os.path.exists(f"/proc/sys/net/ipv6/conf/{name}"):
                write_kernel(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "1")

    @staticmethod
    def rehearse():
        """So that no fork reads libraries and programs from the disk."""
        import fcntl  # noqa: F401
        import subprocess

        subprocess.run(["sh", "-c", ":"], stdin=subprocess.DEVNULL, check=False)
        account_of("nobody")
        mounted_at("/")

    @staticmethod
    def unbind_data_disk():
        device = find_disk("data")
        if device is not None:
            name = os.path.basename(os.path.realpath(f"/sys/block/{os.path.basename(device)}/device"))
            write_kernel("/sys/bus/virtio/drivers/virtio_blk/unbind", name)

    def know_ids(self):
        pids = processes(lambda name: name.startswith(("systemd", "dbus-")))
        for name, path in (("machine-id", "/etc/machine-id"), ("boot-id", BOOT_ID)):
            digits = (read(path) or b"").decode().strip().replace("-", "")
            if name in self.known:
                self.known.pop(name).close()
            if len(digits) == 32:
                self.known[name] = KnownId(digits, pids)

    @staticmethod
    def sync():
        os.sync()


# --- what the host wants to know or to have done about a machine that runs --------------------------------------------


def mount_users(targets):
    """Who keeps these mounts from going: [{pid, comm, target, how, container}], one entry for a process and target.

    A mount namespace of its own (a container) that has the file system at another place, or does not follow ours,
    keeps it too; it is listed once, by its first process.
    """
    wanted = {os.stat(target).st_dev: target for target in targets if mounted_at(target)}
    numbers = {f"{os.major(number)}:{os.minor(number)}": number for number in wanted}
    ours, seen, users = os.stat("/proc/self/ns/mnt").st_ino, set(), []
    for pid in sorted(map(int, filter(str.isdigit, os.listdir("/proc")))):
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


def container_of(pid):
    """The id in its control group's name, as docker, containerd and podman put it there; None without one."""
    text = (read(f"/proc/{pid}/cgroup") or b"").decode(errors="replace")
    for sign in "-/.:\n":
        text = text.replace(sign, " ")
    return next((word for word in text.split() if len(word) == 64 and not word.strip("0123456789abcdef")), None)


def grow_disks():
    """Root and data file system to their devices' size, behind everything else that wants the processor."""
    os.setpriority(os.PRIO_PROCESS, _thread.get_native_id(), 19)
    grown = ["/"] if grow_root() else []
    device = find_disk("data")
    if device is not None and mounted_at(DATA_FOLDER) and grow_ext4(device, DATA_FOLDER):
        grown.append(DATA_FOLDER)
    return {"grown": grown}


def switch_on(path, before, after):
    """Whether a device is on now. The kernel may be switching it on by itself, and refuses to be told meanwhile."""
    if read(path) == before:
        try:
            write_kernel(path, after.decode())
        except OSError as error:
            log(path, error)
    return read(path) == after + b"\n"


def settle_hardware(cpus, memory):
    """Switch on what was plugged in; returns what there is when all has come, or at the latest after PLUG_TIMEOUT."""
    end = time.monotonic() + PLUG_TIMEOUT
    blocks, processors = "/sys/devices/system/memory", "/sys/devices/system/cpu"
    size = int(read(f"{blocks}/block_size_bytes") or b"0", 16)
    while True:
        names = [name for name in os.listdir(blocks) if name[6:].isdigit()] if size else []
        plugged = sum(size for name in names if switch_on(f"{blocks}/{name}/state", b"offline\n", b"online"))
        for name in sorted(os.listdir(processors)):
            path = f"{processors}/{name}/online"
            if len(os.sched_getaffinity(0)) < cpus and name[:3] == "cpu" and os.path.exists(path):
                switch_on(path, b"0\n", b"1")
        online = len(os.sched_getaffinity(0))
        total = int((read("/proc/meminfo") or b"MemTotal: 0").split(None, 2)[1]) << 10
        complete = online >= cpus and (plugged or total * 8 // 7) >= memory  # the kernel keeps a part for itself
        if complete or time.monotonic() > end:
            return {"cpus": online, "memory": total, "complete": complete}
        time.sleep(0.01)


# --- listening ports -------------------------------------------------------------------------------------------------


class Listeners:
    """TCP ports that can be reached in the guest: listening sockets, and host ports that CNI redirects by netfilter.

    Listening sockets are read from sock_diag(7), which looks only at listeners; /proc/net/tcp would walk the table of
    all connections. Containers published by CNI's portmap plugin have no listener at all, but libcni keeps what it
    was asked for in its results cache, one file for each attachment, made on ADD and removed on DEL.
    """

    RESULTS = "/var/lib/cni/results"
    STALE = "/run/qvm-cni-stale"
    REQUEST = struct.Struct("=IHHIIBBBBI48x")

    def __init__(self, root="/"):
        self.results_folder, self.stale_file = root.rstrip("/") + self.RESULTS, root.rstrip("/") + self.STALE
        self.netlink = None
        self.last = None
        self.published = set()
        self.seen = None
        self.again = 0
        self.stale = None

    def remember_stale(self):
        """Results that an unclean end of an earlier boot left belong to no container. To be called once the data disk
        is mounted and before containers start; a restarted agent finds what the first one of this boot wrote.
        """
        if not os.path.exists(self.stale_file):
            names = "".join(f"{name} {mtime}\n" for name, mtime in self.results())
            write_atomic(self.stale_file, names.encode(), 0o600)

    def results(self):
        try:
            with os.scandir(self.results_folder) as entries:
                return sorted((entry.name, entry.stat().st_mtime_ns) for entry in entries)
        except OSError:
            return []

    def changed(self):
        """The new list [[address, port] ...], sorted, or None where it is as it was."""
        current = sorted(self.listening() | self.redirected())
        if current == self.last:
            return None
        self.last = current
        return [list(item) for item in current]

    def listening(self):
        try:
            return self.by_netlink(socket.AF_INET) | self.by_netlink(socket.AF_INET6)
        except OSError:
            self.netlink = None
            return self.by_proc()

    def by_netlink(self, family):
        if self.netlink is None:
            self.netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 4)
            self.netlink.settimeout(1)
        self.netlink.send(self.REQUEST.pack(72, 20, 0x301, 1, 0, family, socket.IPPROTO_TCP, 0, 0, 1 << 10))
        found = set()
        while True:
            reply, at = self.netlink.recv(CHUNK), 0
            while at < len(reply):
                length, kind = struct.unpack_from("=IH", reply, at)
                if kind == 3:  # NLMSG_DONE
                    return found
                if kind == 2:  # NLMSG_ERROR
                    raise OSError(-struct.unpack_from("=i", reply, at + 16)[0], "sock_diag")
                port = struct.unpack_from(">H", reply, at + 20)[0]
                size = 4 if family == socket.AF_INET else 16
                found.add((socket.inet_ntop(family, reply[at + 24 : at + 24 + size]), port))
                at += (length + 3) & ~3

    @staticmethod
    def by_proc():
        found = set()
        for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
            for line in (read(f"/proc/net/{name}") or b"").decode().splitlines()[1:]:
                words = line.split()
                if words[3] == "0A":  # TCP_LISTEN
                    address, port = words[1].split(":")
                    raw = bytes.fromhex(address)
                    raw = b"".join(struct.pack("=I", word) for word in struct.unpack(f">{len(raw) // 4}I", raw))
                    found.add((socket.inet_ntop(family, raw), int(port, 16)))
        return found

    def redirected(self):
        if self.stale is None:
            known = read(self.stale_file)
            if known is None:
                return self.published
            self.stale = set(known.decode().splitlines())
        try:
            stamp = os.stat(self.results_folder).st_mtime_ns
        except OSError:
            stamp = 0
        if stamp != self.seen:
            # A file may be seen before it is filled, so look again at the next two ticks.
            self.seen, self.again = stamp, 3
        if self.again:
            self.again -= 1
            self.published = {
                port for name, mtime in self.results() if f"{name} {mtime}" not in self.stale
                for port in self.mappings(read(f"{self.results_folder}/{name}") or b"")
            }
        return self.published

    @staticmethod
    def mappings(raw):
        try:
            wanted = parse_json(raw)["capabilityArgs"]["portMappings"]
            for mapping in wanted:
                # go-cni writes HostPort where CNI's convention says hostPort; Go reads either.
                item = {key.lower(): value for key, value in mapping.items()}
                if item.get("protocol", "tcp").lower() == "tcp" and item.get("hostport"):
                    yield item.get("hostip") or "0.0.0.0", int(item["hostport"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return


# --- ports and commands ----------------------------------------------------------------------------------------------


class Port:
    """One end of a byte channel to the host: a virtio-serial port, or a socket in tests.

    Watched edge-triggered: a port without a host reports hang-up for as long as that lasts, and the kernel wakes us
    when a host comes (drivers/char/virtio_console.c), so neither state costs a poll.
    """

    def __init__(self, fd):
        self.fd = fd
        self.out = bytearray()
        self.more = False  # there may be more to read without a new event
        self.closed = False
        os.set_blocking(fd, False)

    def read(self, budget=16):
        """What has come, up to `budget` reads of the kernel's 4 KiB each; b"" for nothing, with or without a host."""
        parts = []
        self.more = False
        for _ in range(budget):
            try:
                data = os.read(self.fd, CHUNK)
            except BlockingIOError:
                break
            except OSError as error:
                log("port:", error)
                break
            if not data:
                self.closed = True
                break
            self.closed = False
            parts.append(data)
        else:
            self.more = True
        return b"".join(parts)

    def flush(self):
        while self.out:
            try:
                with memoryview(self.out) as view:
                    sent = os.write(self.fd, view[: 32 << 10])
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.ENOTCONN):
                    log("port:", error)
                self.out.clear()
                return
            del self.out[:sent]

    @property
    def full(self):
        return len(self.out) > OUTBOX_FULL


def account_of(name):
    """What a login sets, and the identity to run with: as subprocess.Popen wants it, nothing for root."""
    import pwd

    account = pwd.getpwnam(name)
    env = {"HOME": account.pw_dir, "USER": name, "LOGNAME": name, "SHELL": account.pw_shell or "/bin/sh"}
    if account.pw_uid == 0:
        return env, {}
    groups = os.getgrouplist(name, account.pw_gid)
    return env, {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": groups}


def set_window(fd, size):
    """Rows and columns of a terminal; its foreground programs get SIGWINCH where they changed (ioctl_tty(2))."""
    import fcntl

    fcntl.ioctl(fd, TIOCSWINSZ, struct.pack("HHHH", int(size["rows"]), int(size["cols"]), 0, 0))


def take_terminal():
    """In a new session, before exec: standard input becomes the controlling terminal."""
    import fcntl

    fcntl.ioctl(0, TIOCSCTTY, 0)


class Command:
    """One program that the host runs here, with its pipes or its terminal, and its end."""

    def __init__(self, agent, number, message):
        self.agent, self.number = agent, number
        self.unacked = 0
        self.input = bytearray()
        self.input_end = False
        self.timed_out = False
        self.deadline = time.monotonic() + message["timeout"] if message.get("timeout") else None
        env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8",
               "HOME": "/root", **agent.env}
        identity = {}
        if message.get("user"):
            login, identity = account_of(message["user"])
            env |= login
        self.terminal = None
        self.start(message, env, identity)
        self.pidfd = os.pidfd_open(self.child.pid)
        self.exited = False
        self.outputs = {}
        for name, file in self.files.items():
            os.set_blocking(file.fileno(), False)
            if name != "in":
                self.outputs[file.fileno()] = name
                agent.watch(file.fileno(), self.on_output, select.EPOLLIN, agent.outputs)
        agent.watch(self.pidfd, self.on_exit, select.EPOLLIN)
        self.feed(unb64(message.get("input") or ""), end=not message.get("stdin"))

    def start(self, message, env, identity):
        import subprocess

        tty = message.get("tty")
        how = {"cwd": message.get("cwd") or "/", "start_new_session": True, "bufsize": 0, **identity}
        if not tty:
            pipe = subprocess.PIPE
            env |= message.get("env") or {}
            self.child = subprocess.Popen(message["argv"], env=env, stdin=pipe, stdout=pipe, stderr=pipe, **how)
            self.files = {"in": self.child.stdin, "out": self.child.stdout, "err": self.child.stderr}
            return
        env |= {"TERM": tty.get("term") or "xterm", **(message.get("env") or {})}
        master, slave = os.openpty()
        try:
            set_window(master, tty)
            os.fchown(slave, identity.get("user", 0), -1)
            self.child = subprocess.Popen(message["argv"], env=env, stdin=slave, stdout=slave, stderr=slave,
                                          preexec_fn=take_terminal, **how)
        except BaseException:
            os.close(master)
            raise
        finally:
            os.close(slave)
        self.terminal = master
        # Two descriptors of one end: epoll and its handlers know each by its number.
        self.files = {"in": os.fdopen(os.dup(master), "wb", 0), "out": os.fdopen(master, "rb", 0)}

    def feed(self, data, *, end):
        self.input += data
        if end and self.terminal is not None and not self.input_end:
            self.input += b"\4"  # a terminal has no end; ^D at a line's beginning stands for one
        self.input_end |= end
        self.on_input(0)

    def on_input(self, _events):
        stdin = self.files["in"]
        if stdin.closed:
            self.input.clear()
            return
        written = 0
        try:
            while self.input:
                with memoryview(self.input) as view:
                    count = os.write(stdin.fileno(), view[:CHUNK])
                del self.input[:count]
                written += count
        except BlockingIOError:
            self.agent.watch(stdin.fileno(), self.on_input, select.EPOLLOUT)
        except OSError:  # the program closed its input; what it would have read is of no use
            written += len(self.input)
            self.input.clear()
            self.input_end = True
        if written:
            self.agent.send({"id": self.number, "taken": written})
        if not self.input:
            self.agent.unwatch(stdin.fileno())
            if self.input_end:
                stdin.close()

    def on_output(self, _events, fds=None):
        for fd in fds or list(self.outputs):
            while self.unacked < OUTPUT_WINDOW and (self.exited or not self.agent.control.full):
                try:
                    data = os.read(fd, CHUNK)
                except BlockingIOError:
                    break
                except OSError:  # EIO: nobody has the terminal open any more
                    data = b""
                if not data:
                    self.drop(fd)
                    break
                self.unacked += len(data)
                self.agent.send_output(self.number, self.outputs[fd], data)
        if self.unacked >= OUTPUT_WINDOW:
            for fd in self.outputs:
                self.agent.unwatch(fd, self.agent.outputs)
        if self.exited:
            self.finish()

    def acknowledge(self, count):
        blocked = self.unacked >= OUTPUT_WINDOW
        self.unacked -= count
        if blocked and self.unacked < OUTPUT_WINDOW:
            for fd in self.outputs:
                self.agent.watch(fd, self.on_output, select.EPOLLIN, self.agent.outputs)
            self.on_output(0)

    def drop(self, fd):
        self.agent.unwatch(fd, self.agent.outputs)
        del self.outputs[fd]

    def on_exit(self, _events):
        self.agent.unwatch(self.pidfd)
        self.child.wait()
        self.exited = True
        self.on_output(0)

    def finish(self):
        """Report the end once all that it wrote is sent; a grandchild that keeps a pipe open is not waited for."""
        if self.unacked >= OUTPUT_WINDOW:
            return
        code = self.child.returncode
        self.release()
        self.agent.send({"id": self.number, "exit": code if code >= 0 else 128 - code, "timed_out": self.timed_out})

    def release(self):
        for fd in list(self.outputs):
            self.drop(fd)
        if not self.files["in"].closed:
            self.agent.unwatch(self.files["in"].fileno())
        for file in self.files.values():
            file.close()
        os.close(self.pidfd)
        self.agent.commands.pop(self.number, None)

    def hang_up(self, name):
        """Nobody reads this output any more: the program finds out when it writes next, as on a broken pipe."""
        for fd in [fd for fd, each in self.outputs.items() if each == name and self.terminal is None]:
            self.drop(fd)
            self.files[name].close()

    def signal(self, number):
        """To the program's process group, and on a terminal to the one in the foreground as well."""
        if self.exited:
            return
        groups = {self.child.pid}
        if self.terminal is not None:
            groups |= {os.tcgetpgrp(self.terminal)} - {0}
        for group in groups:
            try:
                os.killpg(group, number)
            except ProcessLookupError:
                if group == self.child.pid:
                    self.child.send_signal(number)


# --- byte streams ----------------------------------------------------------------------------------------------------

OPEN, OPENED, FAILED, DATA, EOF, RESET, CREDIT = range(1, 8)
HEADER = struct.Struct(">IBI")


class Stream:
    """One connection from the host to a socket in the guest."""

    def __init__(self, mux, number, credit, target):
        self.mux, self.number, self.credit = mux, number, credit
        self.input = bytearray()  # from the host, for the socket; never more than the credit we gave
        self.input_end = self.output_end = self.shut = False
        self.opened = False
        self.mask = 0
        kind, _, rest = target.partition(":")
        if kind == "unix":
            self.socket, self.address = socket.socket(socket.AF_UNIX), rest
        elif kind == "tcp":
            host, _, port = rest.rpartition(":")
            self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.address = ("127.0.0.1" if host == "localhost" else host, int(port))
        else:
            raise Failure(f"unknown target {target!r}")
        self.socket.setblocking(False)
        self.connect()

    def connect(self):
        number = self.socket.connect_ex(self.address)
        if number == errno.EAGAIN:  # a unix listener whose backlog is full: there is no event for that
            self.mux.retry.append(self)
        elif number not in (0, errno.EINPROGRESS):
            self.fail(number)
        else:
            self.interest()

    def fail(self, number):
        self.mux.frame(self.number, FAILED, os.strerror(number).encode())
        self.close()

    def interest(self):
        """Tell epoll what we wait for; nothing at all must be unregistered, or a hang-up would be told for ever."""
        mask = 0
        if self.input or not self.opened:
            mask |= select.EPOLLOUT
        if self.opened and self.credit > 0 and not self.output_end:
            mask |= select.EPOLLIN
        if mask != self.mask:
            self.mask = mask
            if mask:
                self.mux.agent.watch(self.socket.fileno(), self.on_event, mask, self.mux.sockets)
            else:
                self.mux.agent.unwatch(self.socket.fileno(), self.mux.sockets)

    def on_event(self, events):
        try:
            if not self.opened:
                number = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if number:
                    return self.fail(number)
                self.opened = True
                self.mux.frame(self.number, OPENED, struct.pack(">I", STREAM_WINDOW))
            if self.input:
                self.push()
            if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                self.pull()
        except OSError as error:
            self.mux.frame(self.number, RESET, error.strerror.encode())
            self.close()
            return None
        return self.settle()

    def push(self):
        try:
            with memoryview(self.input) as view:
                sent = self.socket.send(view)
        except BlockingIOError:
            return
        del self.input[:sent]
        self.mux.frame(self.number, CREDIT, struct.pack(">I", sent))

    def pull(self):
        if self.output_end or self.credit <= 0 or not self.opened:
            return
        try:
            data = self.socket.recv(min(CHUNK, self.credit))
        except BlockingIOError:
            return
        if data:
            self.credit -= len(data)
            self.mux.frame(self.number, DATA, data)
        else:
            self.output_end = True
            self.mux.frame(self.number, EOF)

    def settle(self):
        if self.input_end and not self.input and not self.shut and self.opened:
            self.shut = True
            try:
                self.socket.shutdown(socket.SHUT_WR)
            except OSError:  # the peer is gone already; its end comes as EOF or a reset
                self.output_end = self.output_end or False
        if self.shut and self.output_end:
            self.close()
        else:
            self.interest()

    def on_frame(self, kind, payload):
        if kind == DATA:
            self.input += payload
            if self.opened:
                self.on_event(0)
        elif kind == EOF:
            self.input_end = True
            self.settle()
        elif kind == CREDIT:
            self.credit += struct.unpack(">I", payload)[0]
            self.interest()
        elif kind == RESET:
            # An unread input makes close() send a TCP reset, which is what the host's side had.
            self.close()

    def close(self):
        if self.mask:
            self.mux.agent.unwatch(self.socket.fileno(), self.mux.sockets)
            self.mask = 0
        self.socket.close()
        self.mux.streams.pop(self.number, None)


class Mux:
    """The stream port: frames to and from the host, one session at a time."""

    def __init__(self, agent, port):
        self.agent, self.port = agent, port
        self.sockets = select.epoll()
        self.streams = {}
        self.retry = []
        self.buffer = bytearray()
        self.marker = None  # bytes that begin the next session; everything before them belongs to an older one
        self.live = False

    def begin(self, marker):
        for stream in list(self.streams.values()):
            stream.close()
        self.retry.clear()
        self.buffer.clear()
        self.port.out.clear()
        self.marker, self.live = marker, False

    def frame(self, number, kind, payload=b""):
        self.port.out += HEADER.pack(number, kind, len(payload))
        self.port.out += payload

    def on_port(self, _events=0):
        self.buffer += self.port.read()
        if self.marker is not None:
            at = self.buffer.find(self.marker)
            if at < 0:
                del self.buffer[: -len(self.marker)]
                return
            del self.buffer[: at + len(self.marker)]
            self.port.out += self.marker
            self.marker, self.live = None, True
        if not self.live:
            self.buffer.clear()
            return
        at, end = 0, len(self.buffer)
        while end - at >= HEADER.size:
            number, kind, length = HEADER.unpack_from(self.buffer, at)
            if kind > CREDIT or length > STREAM_WINDOW:
                log("stream port: lost the frames; the host must begin anew")
                self.begin(None)
                return
            if end - at - HEADER.size < length:
                break
            start = at + HEADER.size
            at = start + length
            self.dispatch(number, kind, bytes(self.buffer[start:at]))
        del self.buffer[:at]

    def dispatch(self, number, kind, payload):
        if kind != OPEN:
            stream = self.streams.get(number)
            if stream is not None:
                stream.on_frame(kind, payload)
            return
        try:
            credit, target = struct.unpack_from(">I", payload)[0], payload[4:].decode()
            stream = self.streams[number] = Stream.__new__(Stream)
            stream.__init__(self, number, credit, target)
        except (OSError, Failure, ValueError) as error:
            self.streams.pop(number, None)
            self.frame(number, FAILED, str(error).encode())


# --- the agent -------------------------------------------------------------------------------------------------------


def open_port(where, name):
    """The fd of a port: `fd:N`, a path, or (None) the virtio port of that name as soon as the kernel has it."""
    if where and where.startswith("fd:"):
        os.set_inheritable(int(where[3:]), False)
        return int(where[3:])
    if where:
        return os.open(where, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    pause = 0.005
    if not os.path.isdir("/sys/bus/virtio/drivers/virtio_console"):
        os.posix_spawnp("modprobe", ["modprobe", "virtio_console"], os.environ)  # udev would do it seconds later
    while True:
        # Not /dev/virtio-ports: those links are udev's, which starts later than we do.
        folder = "/sys/class/virtio-ports"
        for port in os.listdir(folder) if os.path.isdir(folder) else ():
            if (read(f"{folder}/{port}/name") or b"").strip() == name.encode() and os.path.exists(f"/dev/{port}"):
                os.chmod(f"/dev/{port}", 0o600)
                return os.open(f"/dev/{port}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        time.sleep(pause)
        pause = min(pause * 1.5, 0.25)


def notify_ready():
    """Tell systemd that the seed is applied (sd_notify(3)): units ordered after ours begin now."""
    address = os.environ.pop("NOTIFY_SOCKET", None)
    if address:
        sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sender.sendto(b"READY=1", "\0" + address[1:] if address[0] == "@" else address)
        sender.close()


def wait_until_writable(root):
    """Some images mount their root read-only at first; systemd remounts it at about the time we start."""
    end = time.monotonic() + 60
    while os.path.isdir(root) and os.statvfs(root).f_flag & os.ST_RDONLY and time.monotonic() < end:
        time.sleep(0.02)


class Agent:
    def __init__(self, options):
        self.options = options
        self.poll = select.epoll()
        self.outputs = select.epoll()  # pipes of commands; muted as one while the control port is full
        self.handlers = {}
        self.lines = bytearray()
        self.arrived = 0
        self.session = None
        self.digest = None
        self.known = {}
        self.commands = {}
        self.uploads = {}
        self.env = {}
        self.seed = {"state": "pending"}
        self.applying = _thread.allocate_lock()
        self.listeners = None
        self.stopping = False
        self.muted = set()
        self.posted = deque()
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)

    def start(self):
        _thread.start_new_thread(self.apply_seed, ())
        self.control = Port(open_port(self.options["--control"], CONTROL_PORT))
        self.mux = Mux(self, Port(open_port(self.options["--streams"], STREAM_PORT)))
        ports = select.EPOLLIN | select.EPOLLOUT | select.EPOLLET
        self.watch(self.control.fd, self.on_control, ports)
        self.watch(self.mux.port.fd, self.mux.on_port, ports)
        self.watch(self.wake_read, self.on_wake, select.EPOLLIN)
        for inner in (self.outputs, self.mux.sockets):
            self.watch(inner.fileno(), lambda _events, inner=inner: self.dispatch(inner, 0), select.EPOLLIN)
        # Whoever listens already learns that this is a new agent; without a host the line goes nowhere.
        self.control.out += b"\n" + to_json({"event": "started", "pid": os.getpid()}) + b"\n"
        self.control.flush()
        self.control.out.clear()
        self.run()

    # The loop.

    def watch(self, fd, handler, mask, poll=None):
        poll = poll or self.poll
        if self.handlers.get(fd) is None:
            poll.register(fd, mask)
        else:
            poll.modify(fd, mask)
        self.handlers[fd] = handler

    def unwatch(self, fd, poll=None):
        if self.handlers.pop(fd, None) is not None:
            (poll or self.poll).unregister(fd)

    def dispatch(self, poll, timeout):
        for fd, events in poll.poll(timeout):
            handler = self.handlers.get(fd)
            if handler is not None:
                handler(events)

    def mute(self, poll, full):
        """While a port is full, let its sources be: one fd in the outer epoll stands for all of them."""
        if full != (poll in self.muted):
            self.poll.modify(poll.fileno(), 0 if full else select.EPOLLIN)
            (self.muted.add if full else self.muted.discard)(poll)

    def run(self):
        next_tick = 0.0
        while not self.stopping:
            for port, handler in ((self.control, self.on_control), (self.mux.port, self.mux.on_port)):
                if port.more:
                    handler(0)
                port.flush()
            self.mute(self.outputs, self.control.full)
            self.mute(self.mux.sockets, self.mux.port.full)
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + TICK
                self.tick(now)
            waits = [next_tick - now, 0.01 if self.mux.retry else TICK]
            self.dispatch(self.poll, 0 if self.control.more or self.mux.port.more else max(0.0, min(waits)))
            if self.mux.retry:
                waiting, self.mux.retry = self.mux.retry, []
                for stream in waiting:
                    if self.mux.streams.get(stream.number) is stream:
                        stream.connect()

    def tick(self, now):
        for command in list(self.commands.values()):
            if command.deadline is not None and now > command.deadline:
                command.timed_out, command.deadline = True, None
                command.signal(9)
        for port in (self.control, self.mux.port):
            if len(port.out) > OUTBOX_LOST:
                port.out.clear()
        if self.control.closed and self.options["--control"]:
            self.control.read(1)
        if self.session is not None and self.listeners is not None:
            changed = self.listeners.changed()
            if changed is not None:
                self.send({"event": "listeners", "tcp": changed})

    def post(self, function, *args):
        """From another thread: have the loop call this."""
        self.posted.append((function, args))
        os.write(self.wake_write, b"x")

    def on_wake(self, _events):
        os.read(self.wake_read, 4096)
        while self.posted:
            function, args = self.posted.popleft()
            function(*args)

    def in_thread(self, number, function, *args):
        def work():
            try:
                answer = {"id": number, "ok": True, **(function(*args) or {})}
            except Exception as error:
                answer = {"id": number, "error": f"{type(error).__name__}: {error}"}
            self.post(self.send, answer)

        _thread.start_new_thread(work, ())

    # Control messages.

    def send(self, message):
        """To the host, if there is one: without a session nobody would read it."""
        if self.session is not None:
            self.control.out += to_json(message) + b"\n"

    def send_output(self, number, name, data):
        """A command's output, as `send` would, without JSON's look at every letter: it may be gigabytes."""
        if self.session is not None:
            self.control.out += b'{"id":%d,"%s":"' % (number, name.encode())
            self.control.out += binascii.b2a_base64(data, newline=False)
            self.control.out += b'"}\n'

    def on_control(self, _events=0):
        if not self.lines:
            self.arrived = time.monotonic_ns()
        seen = len(self.lines)
        self.lines += self.control.read()
        while True:
            at = self.lines.find(b"\n", seen)
            if at < 0:
                break
            line = bytes(self.lines[:at])
            del self.lines[: at + 1]
            seen = 0
            if line.strip() and not self.take_input(line):
                self.on_line(line)
        if len(self.lines) > MAX_LINE:
            self.lines.clear()
            self.send({"event": "garbage", "message": "a line longer than a message may be"})

    def take_input(self, line):
        """A command's input in the one form the host writes it in, without parsing: it too may be gigabytes."""
        at = line.find(STDIN_MARK, 0, 40)
        if at < 0 or self.session is None or not (line.startswith(b'{"id":') and line.endswith(b'"}')):
            return False
        try:
            command = self.commands.get(int(line[6:at]))
            data = unb64(memoryview(line)[at + len(STDIN_MARK) : -2])
        except ValueError:
            return False
        if command is not None:
            command.feed(data, end=False)
        return True

    def on_line(self, line):
        try:
            message = parse_json(line)
            operation = getattr(self, "op_" + message["op"], None)
        except (ValueError, KeyError, TypeError):
            self.send({"event": "garbage", "message": line[:80].decode(errors="replace")})
            return
        number = message.get("id")
        if operation is None:
            self.send({"id": number, "error": f"unknown operation {message['op']!r}"})
            return
        if self.session is None and message["op"] != "hello":
            return
        try:
            answer = operation(message)
        except Exception as error:  # a request that cannot be done must not end the agent
            answer = {"error": f"{type(error).__name__}: {error}"}
        if answer is not None:
            self.send({"id": number, **answer})

    def op_hello(self, message):
        """A new session: whoever was here before is gone, and so is what it began."""
        if message["nonce"] != self.session:
            for command in self.commands.values():
                command.signal(9)
            self.uploads.clear()
            self.control.out[:] = b"\n"
            self.session, self.listeners = message["nonce"], None
        if self.digest is None:  # 50 ms under emulation; a fork has it from the machine it came from
            self.digest = sha256(read(os.path.abspath(__file__)) or b"")
        return {"ok": True, "nonce": self.session, "version": VERSION, "pid": os.getpid(),
                "boot_id": (read("/proc/sys/kernel/random/boot_id") or b"").decode().strip(),
                "digest": self.digest, "seed": self.seed,
                "uptime": time.clock_gettime(time.CLOCK_BOOTTIME)}

    def op_exec(self, message):
        number = message["id"]
        try:
            self.commands[number] = Command(self, number, message)
        except (OSError, KeyError) as error:
            code = 127 if isinstance(error, FileNotFoundError) else 126
            self.send({"id": number, "err": b64(f"{message['argv'][0]}: {error}\n".encode())})
            return {"exit": code, "timed_out": False}
        return None

    def op_stdin(self, message):
        command = self.commands.get(message["id"])
        if command is not None:
            command.feed(unb64(message.get("data") or ""), end=bool(message.get("eof")))

    def op_resize(self, message):
        command = self.commands.get(message["id"])
        if command is not None and command.terminal is not None:
            set_window(command.terminal, message)

    def op_hang_up(self, message):
        command = self.commands.get(message["id"])
        if command is not None:
            command.hang_up(message["output"])

    def op_ack(self, message):
        command = self.commands.get(message["id"])
        if command is not None:
            command.acknowledge(message["bytes"])

    def op_signal(self, message):
        command = self.commands.get(message["id"])
        if command is not None:
            command.signal(message["signal"])

    def collect(self, message):
        """The whole of an upload that comes in several messages; None until its last."""
        parts = self.uploads.setdefault(message["id"], bytearray())
        parts += unb64(message["data"])
        if message.get("more"):
            return None
        return bytes(self.uploads.pop(message["id"]))

    def op_write_file(self, message):
        data = self.collect(message)
        if data is not None:
            owner = tuple(message["owner"]) if message.get("owner") else None
            self.in_thread(message["id"], lambda: {
                "changed": write_atomic(message["path"], data, message.get("mode", 0o644), owner)})

    def op_set_clock(self, message):
        """Nanoseconds since the epoch; small differences are left to settle by themselves."""
        off = message["time"] - time.time_ns()
        if abs(off) > 50_000_000:
            time.clock_settime_ns(time.CLOCK_REALTIME, message["time"])
        return {"ok": True, "off": off, "changed": abs(off) > 50_000_000}

    def op_mount(self, message):
        user = {**self.user(), **(message.get("user") or {})}
        self.in_thread(message["id"], lambda: {"changed": mount_9p(message, user)})

    def op_umount(self, message):
        def work():
            if mounted_at(message["target"]) is None:
                return {"changed": False}
            sys_umount(message["target"], MNT_DETACH if message.get("lazy") else 0)
            return {"changed": True}

        self.in_thread(message["id"], work)

    def op_apply(self, message):
        document = message["document"]
        if "fork" in document:  # here and now: until it is done nobody has anything else to ask
            return {"ok": True, "seed": self.personalise(document)}
        return self.in_thread(message["id"], lambda: {"seed": self.personalise(document)})

    def op_freeze(self, message):
        def work():
            self.env = {} if message["stage"] != "running" else self.env
            return Freezer(message["stage"], self.known).run()

        if message["stage"] != "running":
            self.seed = {"state": "pending"}
        self.in_thread(message["id"], work)

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
            known = self.known[message["name"]] = KnownId(digits, pids, message["file"])
            return {"found": known.count}

        self.in_thread(message["id"], work)

    def op_stir(self, message):
        add_entropy(unb64(message["entropy"]))
        return {"ok": True}

    def op_grow(self, message):
        self.in_thread(message["id"], grow_disks)

    def op_hardware(self, message):
        self.in_thread(message["id"], lambda: settle_hardware(message["cpus"], message["memory"]))

    def op_mount_users(self, message):
        self.in_thread(message["id"], lambda: {"users": mount_users(message["targets"])})

    def op_listeners(self, message):
        self.listeners = Listeners(self.options["--root"])
        return {"ok": True, "tcp": self.listeners.changed()}

    def op_streams(self, message):
        self.mux.begin(unb64(message["marker"]))
        return {"ok": True}

    def op_shutdown(self, message):
        """Answer, then go down without waiting for anybody's leave."""
        import subprocess

        verb = "reboot" if message.get("reboot") else "poweroff"
        argv = ["systemctl", "--no-block", verb] if os.path.isdir("/run/systemd/system") else [verb]
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
        return {"ok": True}

    def op_update(self, message):
        """Replace this file and become it, keeping the ports: the next `started` event comes from the new one."""
        data = self.collect(message)
        if data is None:
            return
        if self.commands or self.applying.locked():
            raise Failure("commands are running, or the seed is being applied")
        compile(data, "agent.py", "exec")  # a file that Python cannot read must not lock us out
        path = os.path.abspath(__file__)
        changed = write_atomic(path, data, 0o755)
        self.send({"id": message["id"], "ok": True, "changed": changed})
        os.set_blocking(self.control.fd, True)
        self.control.flush()
        fds = {"--control": self.control.fd, "--streams": self.mux.port.fd}
        argv = [sys.executable, "-I", "-S", path]
        for option, value in self.options.items():
            if option in fds:
                os.set_inheritable(fds[option], True)
                argv += [option, f"fd:{fds[option]}"]
            elif value:
                argv += [option, value]
        os.execv(sys.executable, argv)

    # The seed.

    def user(self):
        return self.seed.get("user") or {}

    def personalise(self, document, raw=None):
        with self.applying:
            if "fork" in document:
                fork = Fork(document, self.known, self.arrived, self.options["--root"])
                report = fork.apply()
                _thread.start_new_thread(fork.finish, ())
            else:
                report = Personality(document, self.options["--root"]).apply(sha256(raw or to_json(document)))
        self.env = document.get("env") or {}
        state = "failed" if report["errors"] else "applied"
        self.seed = {"state": state, **report, "user": document.get("user")}
        return self.seed

    def seed_done(self):
        self.send({"event": "seed", **self.seed})
        os.setpriority(os.PRIO_PROCESS, 0, 0)  # our unit starts us ahead of others; commands must not be

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
        self.post(self.seed_done)
        import subprocess  # noqa: F401 - now, so that the first command need not wait for it


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    options = {"--control": None, "--streams": None, "--seed": None, "--root": "/"}
    while argv:
        if argv[0] not in options or len(argv) < 2:
            print(__doc__, file=sys.stderr)
            return 2
        options[argv[0]], argv = argv[1], argv[2:]
    Agent(options).start()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Who a machine is: what the seed document says, as files and mounts of the system."""

import _socket as socket
import os
import time

from .base import Failure, log
from .disks import DATA_FOLDER, MKFS_OPTIONS, Ext4, find_disk, grow_ext4, grow_root, is_blank
from .files import SELINUX, read, write_atomic
from .mounts import MS_BIND, MS_NOATIME, is_mount, mount_9p, mounted_at, sys_mount
from .programs import run_program

STATE_FOLDER = "/etc/qvm"
GATEWAY, NAMESERVER = "10.0.2.2", "10.0.2.3"  # QEMU's user network
SERVICE_DROP_IN = "/etc/systemd/system/service.d/10-qvm-environment.conf"
SERVICE_ENVIRONMENT = f"[Service]\nEnvironmentFile=-{STATE_FOLDER}/environment\n".encode()


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
        labels = (self.labels,) if SELINUX and self.live else ()
        self.run(*(once if fresh else ()), *always, *labels, self.restart_sshd)
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

    def labels(self):
        """Files that are new get the labels that the distribution's policy has for such files (Fedora and its like)."""
        home = (self.doc.get("user") or {}).get("home") or "/root"
        run_program(["restorecon", "-R", "/etc/ssh", "/etc/sudoers.d", STATE_FOLDER, home])

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

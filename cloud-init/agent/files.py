"""Reading and replacing files."""

import _thread
import os

SELINUX = os.path.exists("/sys/fs/selinux/enforce")
LABEL = "security.selinux"  # what takes another file's place needs its label: /etc/shadow has one of its own


def read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


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
            if SELINUX and os.path.exists(path):
                os.setxattr(file.fileno(), LABEL, os.getxattr(path, LABEL))
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

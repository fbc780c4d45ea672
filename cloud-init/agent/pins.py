"""Watched mounts: the inodes of files and folders are kept, and a change of the host's is shown to who watches them.

inotify watches inodes, and 9p without a cache of metadata makes a new one for each lookup: a watch on a folder below
the mount's own hears nothing, not even of the guest's changes. While a name's entry is held open (O_PATH), each lookup
finds it, and with it the one inode. What is held is not asked about again, so the host tells what has changed.
"""

import _thread
import os
import stat

LIMIT = 50_000  # entries; each costs the guest a kilobyte or two
LEFT_OUT = (".git", "node_modules")  # their content; the host's side (qvm/guest/changes.py) has the same


class Pins:
    def __init__(self):
        self.lock = _thread.allocate_lock()
        self.targets = ()
        self.held = {}
        self.turns = {}  # by mount, of who fills it: whoever comes later, or an unmount, ends the ones before

    def hold(self, targets):
        """Hold what is below these mounts, and nothing else; how many entries that are. Takes a while."""
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, LIMIT + 4096), hard))
        self.targets = tuple(targets)
        with self.lock:
            self.drop(lambda path: not any(is_below(path, target) for target in self.targets))
        for target in targets:
            self.fill(target)
        return len(self.held)

    def fill(self, target):
        """One mount, where it is to be held; folders first, which matter more where there are too many."""
        if target not in self.targets:
            return
        turn = self.turns[target] = object()
        folders, files = [], []
        walk = os.walk(target)
        while True:
            with self.lock:  # so that no folder is open while it is being unmounted
                found = next(walk, None) if self.turns.get(target) is turn else None
            if found is None:
                break
            path, names, others = found
            folders.append(path)
            if os.path.basename(path) in LEFT_OUT:
                names[:] = []
            else:
                files += [os.path.join(path, name) for name in others]
        for path in folders + files:
            with self.lock:
                if self.turns.get(target) is not turn:
                    return
                self.pin(path)

    def release(self, target):
        """Before it is unmounted."""
        with self.lock:
            for each in [each for each in self.turns if is_below(each, target) or is_below(target, each)]:
                del self.turns[each]
            self.drop(lambda path: is_below(path, target))

    def drop(self, wanted):
        for path in [path for path in self.held if wanted(path)]:
            os.close(self.held.pop(path))

    def pin(self, path):
        if path in self.held or len(self.held) >= LIMIT:
            return
        try:
            self.held[path] = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # it has gone meanwhile
            return

    def changed(self, paths, gone):
        """The host has changed `paths`, and `gone` are no more; how many watchers could be told of."""
        with self.lock:
            if gone:
                wanted = set(gone)
                self.drop(lambda held: is_in(held, wanted))
            for path in paths:  # all of them before anybody hears of one, and looks
                self.refresh(path)
        return sum(map(show, paths))

    def refresh(self, path):
        if path in self.held and not as_it_was(path, self.held[path]):
            os.close(self.held.pop(path))
        if any(is_below(path, target) for target in self.targets):
            self.pin(path)


def as_it_was(path, fd):
    """Whether a name still stands for the kind of thing that is held for it."""
    try:
        return stat.S_IFMT(os.lstat(path).st_mode) == stat.S_IFMT(os.fstat(fd).st_mode)
    except OSError:
        return False


def is_below(path, folder):
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def is_in(path, folders):
    """Whether it is one of them or below one."""
    while path and path not in folders:
        path = path.rpartition("/")[0]
    return bool(path)


def show(path):
    """An IN_ATTRIB, and for a file an IN_CLOSE_WRITE, without a change: the group becomes what it is, and a file is
    opened for writing; a program is not, since nobody can start it meanwhile. Not its time: 9p has whole seconds
    (s_time_gran), and the host's would lose the rest. Not its mode: who makes a file often sets that next, and would
    find it set back. Pages that a mapping left in memory go."""
    try:
        found = os.lstat(path)
        if stat.S_ISLNK(found.st_mode):
            return False
        if not found.st_mode & (stat.S_ISUID | stat.S_ISGID) or stat.S_ISDIR(found.st_mode):  # chown clears these bits
            os.chown(path, -1, found.st_gid, follow_symlinks=False)
        if stat.S_ISREG(found.st_mode) and not found.st_mode & 0o111:
            fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
    except OSError:  # gone again, or nobody may write to it
        return False
    return True

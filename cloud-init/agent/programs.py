"""Other programs: running one to its end, finding those that run."""

import os

from .base import Failure
from .files import read


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


def processes(wanted):
    """The pids whose name (comm) `wanted` says yes to."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if wanted((read(f"/proc/{pid}/comm") or b"").decode(errors="replace").strip()):
            found.append(int(pid))
    return found


def container_of(pid):
    """The id in its control group's name, as docker, containerd and podman put it there; None without one."""
    text = (read(f"/proc/{pid}/cgroup") or b"").decode(errors="replace")
    for sign in "-/.:\n":
        text = text.replace(sign, " ")
    return next((word for word in text.split() if len(word) == 64 and not word.strip("0123456789abcdef")), None)

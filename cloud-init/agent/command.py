"""Programs that the host runs here."""

import os
import select
import time

from .base import CHUNK, unb64
from .terminal import set_window, take_terminal

OUTPUT_WINDOW = 1 << 20  # bytes of a command's output sent but not yet acknowledged


def account_of(name):
    """What a login sets, and the identity to run with: as subprocess.Popen wants it, nothing for root."""
    import pwd

    account = pwd.getpwnam(name)
    env = {"HOME": account.pw_dir, "USER": name, "LOGNAME": name, "SHELL": account.pw_shell or "/bin/sh"}
    if account.pw_uid == 0:
        return env, {}
    groups = os.getgrouplist(name, account.pw_gid)
    return env, {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": groups}


class Command:
    """One program that the host runs here, with its pipes or its terminal, and its end."""

    def __init__(self, commands, number, message, env):
        self.commands, self.number = commands, number
        self.loop, self.channel = commands.loop, commands.channel
        self.unacked = 0
        self.input = bytearray()
        self.input_end = False
        self.timed_out = False
        self.deadline = time.monotonic() + message["timeout"] if message.get("timeout") else None
        env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8",
               "HOME": "/root", **env}
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
                self.loop.watch(file.fileno(), self.on_output, select.EPOLLIN, commands.outputs)
        self.loop.watch(self.pidfd, self.on_exit, select.EPOLLIN)
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
            self.loop.watch(stdin.fileno(), self.on_input, select.EPOLLOUT)
        except OSError:  # the program closed its input; what it would have read is of no use
            written += len(self.input)
            self.input.clear()
            self.input_end = True
        if written:
            self.channel.send({"id": self.number, "taken": written})
        if not self.input:
            self.loop.unwatch(stdin.fileno())
            if self.input_end:
                stdin.close()

    def on_output(self, _events, fds=None):
        for fd in fds or list(self.outputs):
            while self.unacked < OUTPUT_WINDOW and (self.exited or not self.channel.port.full):
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
                self.channel.send_output(self.number, self.outputs[fd], data)
        if self.unacked >= OUTPUT_WINDOW:
            for fd in self.outputs:
                self.loop.unwatch(fd, self.commands.outputs)
        if self.exited:
            self.finish()

    def acknowledge(self, count):
        blocked = self.unacked >= OUTPUT_WINDOW
        self.unacked -= count
        if blocked and self.unacked < OUTPUT_WINDOW:
            for fd in self.outputs:
                self.loop.watch(fd, self.on_output, select.EPOLLIN, self.commands.outputs)
            self.on_output(0)

    def drop(self, fd):
        self.loop.unwatch(fd, self.commands.outputs)
        del self.outputs[fd]

    def on_exit(self, _events):
        self.loop.unwatch(self.pidfd)
        self.child.wait()
        self.exited = True
        self.on_output(0)

    def finish(self):
        """Report the end once all that it wrote is sent; a grandchild that keeps a pipe open is not waited for."""
        if self.unacked >= OUTPUT_WINDOW:
            return
        code = self.child.returncode
        self.release()
        self.channel.send({"id": self.number, "exit": code if code >= 0 else 128 - code, "timed_out": self.timed_out})

    def release(self):
        for fd in list(self.outputs):
            self.drop(fd)
        if not self.files["in"].closed:
            self.loop.unwatch(self.files["in"].fileno())
        for file in self.files.values():
            file.close()
        os.close(self.pidfd)
        self.commands.running.pop(self.number, None)

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

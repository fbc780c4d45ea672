"""The event loop: one thread, one epoll, and a door for other threads."""

import os
import select
from _collections import deque


class Loop:
    """Calls handlers when their file descriptors are ready, and what other threads post."""

    def __init__(self):
        self.poll = select.epoll()
        self.handlers = {}
        self.muted = set()
        self.posted = deque()
        self.wake_read, self.wake_write = os.pipe()
        os.set_blocking(self.wake_read, False)
        self.watch(self.wake_read, self.on_wake, select.EPOLLIN)

    def group(self):
        """An epoll of its own for descriptors that are muted together: in the outer one a single fd stands for them."""
        inner = select.epoll()
        self.watch(inner.fileno(), lambda _events: self.dispatch(0, inner), select.EPOLLIN)
        return inner

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

    def dispatch(self, timeout, poll=None):
        for fd, events in (poll or self.poll).poll(timeout):
            handler = self.handlers.get(fd)
            if handler is not None:
                handler(events)

    def mute(self, group, full):
        """While a port is full, let its sources be."""
        if full != (group in self.muted):
            self.poll.modify(group.fileno(), 0 if full else select.EPOLLIN)
            (self.muted.add if full else self.muted.discard)(group)

    def post(self, function, *args):
        """From another thread: have the loop call this."""
        self.posted.append((function, args))
        os.write(self.wake_write, b"x")

    def on_wake(self, _events):
        os.read(self.wake_read, 4096)
        while self.posted:
            function, args = self.posted.popleft()
            function(*args)

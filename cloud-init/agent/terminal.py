"""Pseudo-terminals."""

import _struct as struct

from .kernel import POWER, ioctl_number

TIOCSCTTY = 0x540E  # asm-generic/ioctls.h
TIOCSWINSZ = ioctl_number("w", "t", 103, 8) if POWER else 0x5414


def set_window(fd, size):
    """Rows and columns of a terminal; its foreground programs get SIGWINCH where they changed (ioctl_tty(2))."""
    import fcntl

    fcntl.ioctl(fd, TIOCSWINSZ, struct.pack("HHHH", int(size["rows"]), int(size["cols"]), 0, 0))


def take_terminal():
    """In a new session, before exec: standard input becomes the controlling terminal."""
    import fcntl

    fcntl.ioctl(0, TIOCSCTTY, 0)

"""What everything here uses."""

import binascii
import sys

CHUNK = 64 << 10  # bytes that one read of a pipe or socket takes at most


def log(*words):
    print("qvm-agent:", *words, file=sys.stderr, flush=True)


def b64(data):
    return binascii.b2a_base64(data, newline=False).decode()


def unb64(text):
    return binascii.a2b_base64(text)


def sha256(data):
    try:
        from _sha2 import sha256 as new  # hashlib itself loads OpenSSL, which costs more than all our imports
    except ImportError:
        try:
            from _sha256 import sha256 as new
        except ImportError:
            from hashlib import sha256 as new
    return new(data).hexdigest()


class Failure(Exception):
    """Something the host asked for cannot be done; the text goes back to it."""

"""Run by a Python of the image's version, with frozen modules and `encodings` only: what importing a source would make.

    compile.py PATH         source on standard input, .pyc on standard output, the tag for its name on standard error
    compile.py --tree ROOT  paths below ROOT on standard input, each compiled into its __pycache__

The first kind is hash-based and checked (PEP 552), so that a file replaced later is compiled anew; those of a tree go
by time and size, as Debian's py3compile makes them.
"""

import _frozen_importlib_external as machinery
import _imp
import marshal
import os
import sys

MAGIC = machinery.MAGIC_NUMBER
TAG = sys.implementation.cache_tag


def compile_one(path: str) -> None:
    source = sys.stdin.buffer.read()
    digest = _imp.source_hash(int.from_bytes(MAGIC, "little"), source)
    code = compile(source, path, "exec", dont_inherit=True)
    sys.stdout.buffer.write(MAGIC + (3).to_bytes(4, "little") + digest + marshal.dumps(code))
    sys.stderr.write(TAG + "\n")


def compile_tree(root: str) -> None:
    for line in sys.stdin:
        path = "/" + line.rstrip("\n")
        if os.path.islink(root + path) and os.readlink(root + path).startswith("/"):
            continue  # it would lead out of the tree
        status = os.stat(root + path)
        with open(root + path, "rb") as file:
            source = file.read()
        try:
            code = compile(source, path, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            print(f"{path} is not compiled: {error}")
            continue
        folder, _, name = (root + path).rpartition("/")
        os.makedirs(f"{folder}/__pycache__", 0o755, exist_ok=True)
        head = MAGIC + bytes(4) + (int(status.st_mtime) & 0xFFFFFFFF).to_bytes(4, "little")
        with open(f"{folder}/__pycache__/{name[:-3]}.{TAG}.pyc", "wb") as file:
            file.write(head + (len(source) & 0xFFFFFFFF).to_bytes(4, "little") + marshal.dumps(code))


if sys.argv[1] == "--tree":
    compile_tree(sys.argv[2])
else:
    compile_one(sys.argv[1])

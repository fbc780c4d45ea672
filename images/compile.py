"""Run by an image's own Python, before the image exists: the .pyc that importing a source would make.

Source on standard input, result on standard output, the tag for its file name on standard error. Hash-based and
checked (PEP 552), so that a file replaced later is compiled anew. Only frozen modules and `encodings` can be imported.
"""

import _frozen_importlib_external as machinery
import _imp
import marshal
import sys

source = sys.stdin.buffer.read()
magic = machinery.MAGIC_NUMBER
digest = _imp.source_hash(int.from_bytes(magic, "little"), source)
code = compile(source, sys.argv[1], "exec", dont_inherit=True)
sys.stdout.buffer.write(magic + (3).to_bytes(4, "little") + digest + marshal.dumps(code))
sys.stderr.write(sys.implementation.cache_tag + "\n")

"""Downloads for plugins: resumable, digest-checked, one at a time for each file, by way of QVM_MIRROR; and locks."""

from qvm.image.download import Digest, digest_of, download, mirrored, parse_digest
from qvm.locks import lock

__all__ = ["Digest", "digest_of", "download", "lock", "mirrored", "parse_digest"]

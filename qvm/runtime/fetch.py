"""Downloads for plugins: resumable, digest-checked, one at a time for each file, by way of QVM_MIRROR."""

from qvm.image.download import Digest, digest_of, download, mirrored, parse_digest

__all__ = ["Digest", "digest_of", "download", "mirrored", "parse_digest"]

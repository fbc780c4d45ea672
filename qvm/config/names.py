"""Names a profile may have: they become folder names, docker context names and parts of socket paths."""

from __future__ import annotations

import re
from collections.abc import Mapping

DEFAULT_PROFILE = "default"

# 39 characters leave room for the socket names below a home folder of usual length (see qvm.filenames).
_PROFILE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,38}")

# Words that stand where a profile's name may stand on the command line.
LOG_KINDS = ("serial", "supervisor", "runtime", "boot")
RESERVED = frozenset({*LOG_KINDS, "all", "none"})


def validate_profile_name(name: str) -> list[str]:
    """What is wrong with `name` as a profile's name; nothing where it is fine."""
    if name in RESERVED:
        return [f"{name!r} is a reserved word and cannot name a profile"]
    if _PROFILE.fullmatch(name) is None:
        return [
            f"{name!r} cannot name a profile: use 1 to 39 of a-z, 0-9, '-', '_' and '.', with a letter or digit first"
        ]
    return []


def default_profile(environ: Mapping[str, str]) -> str:
    """The profile a command works on where none is named."""
    return environ.get("QVM_PROFILE") or environ.get("QVM_DEFAULT_PROFILE") or DEFAULT_PROFILE

"""How the agent mounts on which kernel."""

from __future__ import annotations

import pytest
from guest_agent import load_agent


@pytest.mark.parametrize("release, shared, cache", [
    ("6.12.117+deb13-amd64", False, "readahead,directio"), ("6.12.117+deb13-amd64", True, "mmap,directio"),
    ("6.4-rc1", False, "readahead,directio"), ("6.1.0-37-cloud-amd64", False, "mmap,directio"),
    ("5.15.0", True, "mmap,directio"),
])  # fmt: skip
def test_the_cache_loses_no_writes(release: str, shared: bool, cache: str) -> None:
    assert load_agent().cache_mode(release, shared=shared) == cache

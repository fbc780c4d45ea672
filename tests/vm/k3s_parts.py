"""A real k3s for the tests, where there is one, and the one image that no pod runs without."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

PAUSE = "rancher/mirrored-pause:3.6"
MISSING = (
    "no k3s here: set QVM_K3S to a k3s binary of release v1.34 (github.com/k3s-io/k3s/releases), "
    "or put it at {place}; everything around it is tested without"
)


def find_k3s(cache_home: Path) -> Path:
    """The binary; skips the test, saying how to supply it, where there is none."""
    named = os.environ.get("QVM_K3S")
    place = Path(named).expanduser() if named else cache_home / "test-tools" / "k3s"
    binary = place / "k3s" if place.is_dir() else place
    if not binary.is_file():
        pytest.skip(MISSING.format(place=cache_home / "test-tools" / "k3s" / "k3s"))
    return binary


def make_place(binary: Path, folder: Path) -> Path:
    """What QVM_K3S names in the tests: the binary, and an archive with the pause image made of Debian's busybox."""
    folder.mkdir()
    (folder / "k3s").symlink_to(binary)
    script = "trap 'exit 0' TERM INT; while :; do busybox sleep 3600 & wait; done"
    write_image(folder / "pause.tar", PAUSE, Path("/bin/busybox"), ["/bin/busybox", "sh", "-c", script])
    return folder


def write_image(path: Path, name: str, busybox: Path, entrypoint: list[str]) -> None:
    """An archive as `docker save` makes it (image-spec v1.2): one layer with busybox in it."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(busybox, "bin/busybox", filter=_plain)
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    config = json.dumps({
        "architecture": "amd64", "os": "linux", "config": {"Entrypoint": entrypoint, "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
    }).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]).encode()
    with tarfile.open(path, "w") as tar:
        for entry, data in (("layer.tar", layer.getvalue()), ("config.json", config), ("manifest.json", manifest)):
            info = tarfile.TarInfo(entry)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.mode, info.uid, info.gid, info.uname, info.gname, info.mtime = 0o755, 0, 0, "", "", 0
    return info


WEB = """
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  enableServiceLinks: false
  automountServiceAccountToken: false
  containers:
  - {name: web, image: "IMAGE", imagePullPolicy: Never}
---
apiVersion: v1
kind: Service
metadata: {name: node}
spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, nodePort: 30380}]}
---
apiVersion: v1
kind: Service
metadata: {name: balanced}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 8385, targetPort: 80}]}
"""

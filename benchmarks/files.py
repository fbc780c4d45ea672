"""Mounted folders: small files and streaming, by how they are mounted, beside the host and the guest's own disk.

    python benchmarks/files.py [--files 20000] [--size 256] [--profile NAME]

Each row is the same folder of the host in the same VM, unmounted and mounted anew with other options by hand: what
plain QEMU 9p with a given msize and cache does. `qvm` is what qvm mounts with. Rows are measured in turn, `--rounds`
times, and the best is shown: others' load only adds. Every stream is checked by its digest on the host.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import qvm

MiB = 1 << 20
OPTIONS = {
    "qvm": "",
    "msize 512K cache=none": "msize=524288,cache=none",
    "msize 512K cache=mmap": "msize=524288,cache=mmap",
    "msize 512K cache=loose": "msize=524288,cache=loose",
    "msize 128K readahead,directio": "msize=131072,cache=readahead,directio",
    "msize 1M readahead,directio": "msize=1048576,cache=readahead,directio",
}
WORK = {
    "untar": "mkdir t && tar -xf {tar} -C t && sync -f t",
    "find": "find t -type f -size +100000c",
    "rm": "rm -r t",
    "write": "dd if=/dev/zero of=big bs=1M count={size} conv=fsync 2>/dev/null",
    "read": "cat big >/dev/null",
}


def make_tar(path: Path, count: int) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            data = f"file {number}\n".encode() * (1 + number % 100)
            info = tarfile.TarInfo(f"d{number // 100}/f{number}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def measure(run: Callable[[str], None], folder: str, tar: str, size: int) -> dict[str, float]:
    """Seconds by kind of work."""
    took = {}
    for name, script in WORK.items():
        began = time.monotonic()
        run(f"cd {folder} && {script.format(tar=tar, size=size)}")
        took[name] = time.monotonic() - began
    return took


def show(rows: dict[str, dict[str, float]], size: int) -> None:
    print(f"{'':32}" + "".join(f"{name:>10}" for name in WORK) + "   (s; write and read in MiB/s)")
    for name, took in rows.items():
        cells = [f"{took[key]:.2f}" if key not in ("write", "read") else f"{size / took[key]:.0f}" for key in WORK]
        print(f"{name:32}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=256, help="MiB")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--profile", default="bench-files")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="qvm-files-"))
    rows: dict[str, dict[str, float]] = {}
    vm = qvm.start(options.profile, runtime="none", mounts=[{"source": str(folder), "target": "/bench"}])
    try:
        make_tar(folder / "t.tar", options.files)

        def host(script: str) -> None:
            subprocess.run(["sh", "-c", script], check=True)

        def guest(script: str) -> None:
            vm.run(["sh", "-c", script], timeout=3600, check=True)

        guest("cp /bench/t.tar /var/tmp/t.tar && mkdir -p /var/tmp/own")
        for _ in range(options.rounds):
            note(rows, "host", measure(host, str(folder), str(folder / "t.tar"), options.size))
            note(rows, "guest's own disk", measure(guest, "/var/tmp/own", "/var/tmp/t.tar", options.size))
            for name, words in OPTIONS.items():
                if words:
                    guest(f"umount /bench; mount -t 9p -o trans=virtio,version=9p2000.L,access=any,{words} qvm0 /bench")
                (folder / "big").unlink(missing_ok=True)
                note(rows, name, measure(guest, "/bench", "/var/tmp/t.tar", options.size))
                check_stream(folder / "big", options.size)
            guest("umount /bench")
            vm.unmount("/bench", force=True)
            vm.mount(folder, "/bench")
        show(rows, options.size)
        print("load", *(f"{value:.1f}" for value in os.getloadavg()))
    finally:
        vm.delete(data=True)
        shutil.rmtree(folder)
    return 0


def note(rows: dict[str, dict[str, float]], name: str, took: dict[str, float]) -> None:
    before = rows.get(name, took)
    rows[name] = {key: min(took[key], before[key]) for key in took}
    print(name, {key: round(value, 2) for key, value in took.items()}, file=sys.stderr, flush=True)


def check_stream(path: Path, size: int) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != hashlib.sha256(bytes(size * MiB)).hexdigest():
        raise SystemExit(f"{path} is not what was written")


if __name__ == "__main__":
    sys.exit(main())

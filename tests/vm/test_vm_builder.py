"""The VM that builds for a host without mmdebstrap: a real one, with a script of the test's in the place of the build's
(which takes minutes there). What that script finds is what the build needs.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qvm.arch import host_arch
from qvm.commands.builder import build_in_vm, choose_image
from qvm.errors import ImageError
from qvm.image.builder import BuildJob
from qvm.progress import NullProgress

pytestmark = pytest.mark.vm

SCRIPT = """\
set -eu
echo "qvm-phase: $(id -u) $QVM_WORD"
cat "$QVM_PACKAGES/there.deb" >"$QVM_OUT/copied"
echo more >"$QVM_PACKAGES/new.deb"
if touch "$(dirname "$0")/spoilt" 2>/dev/null; then exit 9; fi
for program in mke2fs apt-get dpkg xz zstd unshare; do command -v $program >/dev/null; done
unshare --mount --pid --fork --kill-child -- sh -c 'mount -t tmpfs none /mnt && mkdir /mnt/root' && [ ! -e /mnt/root ]
truncate -s 1G /var/tmp/sparse && echo end >>/var/tmp/sparse
cp --sparse=always /var/tmp/sparse "$QVM_OUT/sparse"
[ -z "${QVM_FAIL-}" ] || { echo "E: as asked" >&2; exit 3; }
"""


@pytest.fixture
def job(tmp_path: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> BuildJob:
    monkeypatch.setenv("QVM_CACHE_HOME", str(cache_home))
    monkeypatch.setenv("QVM_HOME", str(tmp_path / "q"))
    for name in ("scripts", "out", "packages"):
        (tmp_path / name).mkdir()
    (tmp_path / "scripts" / "build-vm.sh").write_text(SCRIPT)
    (tmp_path / "packages" / "there.deb").write_text("package")
    return BuildJob("test", host_arch(), tmp_path / "scripts", tmp_path / "out", tmp_path / "packages",
                    {"QVM_WORD": "two words", "QVM_PACKAGES": os.fspath(tmp_path / "packages")})


def test_a_vm_builds_as_root_with_the_host_folders(job: BuildJob) -> None:
    lines: list[str] = []
    build_in_vm(job, on_line=lines.append, log=lambda _: None, progress=NullProgress())
    assert "qvm-phase: 0 two words" in lines
    assert (job.out / "copied").read_text() == "package"
    assert (job.packages / "new.deb").read_text() == "more\n"
    assert sorted(path.name for path in job.scripts.iterdir()) == ["build-vm.sh"]
    sparse = (job.out / "sparse").stat()
    assert sparse.st_size == (1 << 30) + 4 and sparse.st_blocks * 512 < 1 << 20

    failing = BuildJob(job.name, job.host, job.scripts, job.out, job.packages, {**job.environment, "QVM_FAIL": "1"})
    with pytest.raises(ImageError, match="in a VM failed") as caught:
        build_in_vm(failing, on_line=lines.append, log=lambda _: None, progress=NullProgress())
    assert "E: as asked" in (caught.value.details or "")


def test_the_newest_of_our_own_images_builds(job: BuildJob) -> None:
    assert len(choose_image(job.host)) == 64

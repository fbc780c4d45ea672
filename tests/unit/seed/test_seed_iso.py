from __future__ import annotations

import io
import time
from pathlib import Path

import pycdlib
import pytest

from qvm.errors import HostError
from qvm.seed.iso import build_iso, iso_name, write_iso

FILES = {
    "meta-data": b"instance-id: x\n", "user-data": bytes(range(256)) * 40, "network-config": b"", "qvm.json": b"{}",
}


@pytest.mark.parametrize(("name", "expected"), [
    ("meta-data", "/META_DATA.;1"), ("qvm.json", "/QVM.JSON;1"), ("network-config", "/NETWORK_CONFIG.;1"),
])
def test_plain_names(name: str, expected: str) -> None:
    assert iso_name(name) == expected


def test_every_reader_finds_the_files() -> None:
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(build_iso(FILES)))
    assert iso.pvd.volume_identifier.strip() == b"cidata"
    for name, data in FILES.items():
        for path in ({"rr_path": f"/{name}"}, {"joliet_path": f"/{name}"}, {"iso_path": iso_name(name)}):
            out = io.BytesIO()
            iso.get_file_from_iso_fp(out, **path)
            assert out.getvalue() == data
        assert iso.get_record(rr_path=f"/{name}").rock_ridge.get_file_mode() == 0o100400
    iso.close()


def test_same_files_same_bytes_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    before = build_iso(FILES)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10**6)
    assert build_iso(dict(reversed(FILES.items()))) == before
    assert pycdlib.pycdlib.time is time, "the clock was put back"


def test_written_whole_private_and_only_when_different(tmp_path: Path) -> None:
    path = tmp_path / "seed.iso"
    assert write_iso(FILES, path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    stamp = path.stat().st_mtime_ns
    assert not write_iso(FILES, path)
    assert path.stat().st_mtime_ns == stamp and path.stat().st_mode & 0o777 == 0o600
    assert write_iso(FILES | {"qvm.json": b"[]"}, path)
    assert [each.name for each in tmp_path.iterdir()] == ["seed.iso"]


def test_a_folder_that_cannot_be_written_is_a_host_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot write the seed"):
        write_iso(FILES, tmp_path / "missing" / "seed.iso")

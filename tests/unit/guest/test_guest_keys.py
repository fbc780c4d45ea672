from __future__ import annotations

from pathlib import Path

import pytest

from qvm.errors import HostError
from qvm.filenames import Files
from qvm.guest.keys import ensure_key, known_hosts_text, quote_path, ssh_config_text


def test_keys_are_private_and_made_once(tmp_path: Path) -> None:
    path = tmp_path / "id_ed25519"
    public = ensure_key(path, comment="qvm-dev")
    private = path.read_bytes()
    assert private.startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    assert public.startswith("ssh-ed25519 AAAA") and public.endswith(" qvm-dev")
    assert path.stat().st_mode & 0o777 == 0o600
    assert ensure_key(path, comment="other") == public and path.read_bytes() == private
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["id_ed25519", "id_ed25519.pub"]


def test_a_lost_public_key_is_made_from_the_private_one(tmp_path: Path) -> None:
    path = tmp_path / "id_ed25519"
    public = ensure_key(path, comment="qvm-dev")
    path.with_suffix(".pub").unlink()
    assert ensure_key(path, comment="qvm-dev") == public


def test_a_damaged_private_key_is_never_replaced_silently(tmp_path: Path) -> None:
    path = tmp_path / "id_ed25519"
    path.write_text("damaged")
    with pytest.raises(HostError, match="cannot be read"):
        ensure_key(path, comment="qvm-dev")
    assert path.read_text() == "damaged"


def test_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot write"):
        ensure_key(tmp_path / "missing" / "id_ed25519", comment="x")


def test_two_instances_share_no_key(tmp_path: Path) -> None:
    keys = {ensure_key(tmp_path / name, comment="same").split()[1] for name in ("a", "b")}
    assert len(keys) == 2


def test_known_hosts_pins_alias_and_port(tmp_path: Path) -> None:
    public = ensure_key(tmp_path / "host", comment="a comment of words")
    kind, key = public.split()[:2]
    assert known_hosts_text("dev", 2222, tmp_path / "host") == f"qvm-dev,[127.0.0.1]:2222 {kind} {key}\n"


def test_quoting() -> None:
    assert quote_path(Path("/home/a b/100%/q\"x")) == '"/home/a b/100%%/q\\"x"'


@pytest.mark.parametrize(("length", "shared"), [(20, True), (90, False)])
def test_connections_are_shared_where_the_socket_fits(
    length: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QVM_HOME", "/" + "q" * length)
    text = ssh_config_text(Files("dev"), user="ann", port=2222)
    assert ("ControlMaster auto" in text) is shared
    assert text.startswith("Host qvm-dev\n    HostName 127.0.0.1\n    Port 2222\n    User ann\n")
    assert "StrictHostKeyChecking yes" in text and "StrictHostKeyChecking no" not in text

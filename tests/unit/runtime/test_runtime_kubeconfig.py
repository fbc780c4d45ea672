"""The user's kubeconfig: what is not ours stays, byte for byte."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
import yaml

from runtimes.k3s import kubeconfig, kubefiles
from runtimes.k3s.kubeconfig import Access, ForeignEntryError, build_entries
from runtimes.k3s.yamledit import CannotEditError

HOME = "/home/ann/.qvm"
ACCESS = Access("https://127.0.0.1:40001", "Q0E=", "Q0VSVA==", "S0VZ")
ENTRIES = build_entries("qvm-dev", ACCESS, home=HOME)

KUBECTL = """\
apiVersion: v1
clusters:
- cluster:
    server: https://prod.example:6443   # do not touch
  name: prod
contexts:
- context:
    cluster: prod
    user: prod
  name: prod
# who we are
current-context: prod
kind: Config
preferences: {}
users:
- name: prod
  user:
    token: "0123"
"""
INDENTED = """\
# my clusters
users:
  - name: a
    user: {token: x}
  # a second one
  - name: b
    user:
      token: |
        two
        lines

contexts:
    - {name: a, context: {cluster: a, user: a}}


clusters:

- name: a
  cluster: {server: "https://a"}   # a
current-context: "a"
# the end"""
JSON = json.dumps({"apiVersion": "v1", "kind": "Config", "clusters": [{"name": "a", "cluster": {"server": "x"}}],
                   "contexts": [], "users": [], "current-context": "a"}, indent=4) + "\n"
ONE_LINE = '{"current-context": "", "clusters": [ ]}'
EMPTY_LISTS = "apiVersion: v1\nkind: Config\nclusters: []\ncontexts:\nusers: null\ncurrent-context:\n"
DOCUMENT = "---\n# start\napiVersion: v1\nusers: []\n...\n"
SAMPLES = {
    "kubectl": KUBECTL, "indented": INDENTED, "json": JSON, "one line": ONE_LINE, "empty lists": EMPTY_LISTS,
    "document": DOCUMENT, "crlf": KUBECTL.replace("\n", "\r\n"), "crlf indented": INDENTED.replace("\n", "\r\n"),
    "no newline at the end": KUBECTL.rstrip("\n"),
    "tail": KUBECTL + "\n\n# bye\n",
    "umlaut": KUBECTL.replace("who we are", "wer wir sind: 世界 ü"), "empty mapping": "{}\n",
}


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES)
def test_what_is_put_in_and_taken_out_leaves_no_trace(text: str) -> None:
    merged = kubeconfig.merge(text, ENTRIES, home=HOME)
    document = yaml.safe_load(merged)
    for key, entry in ENTRIES.items():
        assert document[key][-1] == entry
    assert merged != text
    assert kubeconfig.remove(merged, "qvm-dev", home=HOME, former=kubeconfig.former_lists(text)) == text


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES)
def test_every_line_of_the_users_is_still_there_in_order(text: str) -> None:
    merged = iter(kubeconfig.merge(text, ENTRIES, home=HOME).splitlines())
    if text.lstrip("\ufeff").startswith("{") and "\n" not in text.strip():
        return  # one line only, which holds ours too
    for line in text.splitlines():
        if line.endswith(("[]", "[],", "null", "contexts:")):  # took ours in
            line = line.split(":")[0]
            assert any(line in other for other in merged)
        else:
            assert any(line.rstrip() == other.rstrip() or line.rstrip() + "," in other for other in merged), line


@pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES)
def test_the_current_context_is_switched_and_put_back(text: str) -> None:
    before = kubeconfig.current(text)
    switched = kubeconfig.set_current(text, "qvm-dev")
    assert yaml.safe_load(switched)["current-context"] == "qvm-dev"
    assert kubeconfig.set_current(switched, None if before is None else before[1]) == text


def test_an_entry_is_renewed_where_the_port_has_changed() -> None:
    merged = kubeconfig.merge(KUBECTL, ENTRIES, home=HOME)
    assert kubeconfig.merge(merged, ENTRIES, home=HOME) == merged
    other = build_entries("qvm-dev", Access("https://127.0.0.1:5", "Q0E=", "Q0VSVA==", "S0VZ"), home=HOME)
    renewed = kubeconfig.merge(merged, other, home=HOME)
    servers = [entry["cluster"]["server"] for entry in yaml.safe_load(renewed)["clusters"]]
    assert servers == ["https://prod.example:6443", "https://127.0.0.1:5"]
    assert kubeconfig.remove(renewed, "qvm-dev", home=HOME) == KUBECTL


def test_two_profiles_come_and_go_in_any_order() -> None:
    other = build_entries("qvm", ACCESS, home=HOME)
    both = kubeconfig.merge(kubeconfig.merge(KUBECTL, ENTRIES, home=HOME), other, home=HOME)
    left = kubeconfig.remove(both, "qvm-dev", home=HOME)
    assert left == kubeconfig.merge(KUBECTL, other, home=HOME)
    assert kubeconfig.remove(left, "qvm", home=HOME) == KUBECTL


def test_an_entry_of_somebody_elses_is_not_touched() -> None:
    theirs = KUBECTL.replace("name: prod", "name: qvm-dev")
    with pytest.raises(ForeignEntryError):
        kubeconfig.merge(theirs, ENTRIES, home=HOME)
    assert kubeconfig.remove(theirs, "qvm-dev", home=HOME) == theirs
    merged = kubeconfig.merge(KUBECTL, ENTRIES, home=HOME)
    with pytest.raises(ForeignEntryError):
        kubeconfig.merge(merged, build_entries("qvm-dev", ACCESS, home="/another/home"), home="/another/home")
    assert kubeconfig.remove(merged, "qvm-dev", home="/another/home") == merged


@pytest.mark.parametrize("text", [
    "- a list\n", "just text\n", "clusters: 3\n", "clusters: {a: 1}\n", "a: 1\n---\nb: 2\n", "a: [1\n",
    "{\"a\": 1", "~\n",
    "clusters: &a\n- name: x\nusers: *a\n",
])
def test_what_cannot_be_changed_safely_is_refused(text: str) -> None:
    with pytest.raises(CannotEditError):
        kubeconfig.merge(text, ENTRIES, home=HOME)


def test_kubectls_rewriting_keeps_ours_removable() -> None:
    """`kubectl config` writes the whole file anew: sorted, without comments."""
    merged = kubeconfig.merge(KUBECTL, ENTRIES, home=HOME)
    rewritten = yaml.safe_dump(yaml.safe_load(merged), sort_keys=True)
    assert yaml.safe_load(kubeconfig.remove(rewritten, "qvm-dev", home=HOME)) == yaml.safe_load(KUBECTL)


# --- files

def env_of(*paths: Path) -> dict[str, str]:
    return {"HOME": str(paths[0].parent), "KUBECONFIG": os.pathsep.join(map(str, paths))}


def publish(env: dict[str, str], state: Path, *, switch: bool = True) -> None:
    kubefiles.publish(kubefiles.find_files(env), ENTRIES, state, home=HOME, switch=switch)


def withdraw(state: Path, *, drop: bool = True) -> None:
    kubefiles.withdraw("qvm-dev", state, home=HOME, drop=drop)


def test_stop_and_delete_put_back_what_start_changed(tmp_path: Path) -> None:
    path, state = tmp_path / "config", tmp_path / "state" / "kube.json"
    path.write_text(KUBECTL)
    path.chmod(0o640)
    publish(env_of(path), state)
    assert yaml.safe_load(path.read_text())["current-context"] == "qvm-dev"
    withdraw(state, drop=False)
    assert path.read_text() == kubeconfig.merge(KUBECTL, ENTRIES, home=HOME)
    publish(env_of(path), state)
    withdraw(state)
    withdraw(state)
    assert path.read_text() == KUBECTL
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config", "state"]


def test_a_missing_file_is_made_for_its_owner_and_goes_again(tmp_path: Path) -> None:
    state = tmp_path / "kube.json"
    env = {"HOME": str(tmp_path)}
    publish(env, state)
    path = tmp_path / ".kube" / "config"
    assert path.stat().st_mode & 0o777 == 0o600
    assert yaml.safe_load(path.read_text())["current-context"] == "qvm-dev"
    withdraw(state)
    assert not path.exists()


def test_a_file_that_others_use_meanwhile_stays(tmp_path: Path) -> None:
    state, env = tmp_path / "kube.json", {"HOME": str(tmp_path)}
    publish(env, state)
    path = tmp_path / ".kube" / "config"
    other = build_entries("kind", ACCESS, home="elsewhere")
    path.write_text(kubeconfig.set_current(kubeconfig.merge(path.read_text(), other, home="elsewhere"), "kind"))
    withdraw(state)
    left = yaml.safe_load(path.read_text())
    assert left["current-context"] == "kind" and [entry["name"] for entry in left["users"]] == ["kind"]


def test_a_byte_order_mark_stays_in_front(tmp_path: Path) -> None:
    path, state = tmp_path / "config", tmp_path / "kube.json"
    path.write_text("\ufeff" + KUBECTL)
    publish(env_of(path), state)
    assert path.read_text()[0] == "\ufeff" and yaml.safe_load(path.read_text())["current-context"] == "qvm-dev"
    withdraw(state)
    assert path.read_text() == "\ufeff" + KUBECTL


def test_a_large_file_takes_no_time(tmp_path: Path) -> None:
    """A hundred clusters with certificates; the slow parser would take seconds on any machine."""
    certificate = "Q0E" * 700
    entries = [build_entries(f"c{number}", Access("https://x", *[certificate] * 3), home="x") for number in range(100)]
    text = yaml.safe_dump({key: [entry[key] for entry in entries] for key in kubeconfig.LISTS}, width=1 << 30)
    began = time.process_time()
    merged = kubeconfig.merge(text, ENTRIES, home=HOME)
    assert kubeconfig.remove(merged, "qvm-dev", home=HOME) == text
    assert time.process_time() - began < 10 or not yaml.__with_libyaml__


def test_a_symlink_stays_one(tmp_path: Path) -> None:
    real, link, state = tmp_path / "dotfiles", tmp_path / "config", tmp_path / "kube.json"
    real.write_text(KUBECTL)
    link.symlink_to(real.name)
    publish(env_of(link), state)
    assert link.is_symlink() and "qvm-dev" in real.read_text()
    withdraw(state)
    assert link.is_symlink() and real.read_text() == KUBECTL


def test_of_a_list_of_files_kubectls_choice_is_changed(tmp_path: Path) -> None:
    gone, first, second = tmp_path / "gone", tmp_path / "first", tmp_path / "second"
    first.write_text(DOCUMENT)
    second.write_text(KUBECTL)
    state = tmp_path / "kube.json"
    publish(env_of(gone, first, second), state)
    assert "qvm-dev" in first.read_text()
    assert second.read_text() == KUBECTL.replace("current-context: prod", "current-context: qvm-dev")
    withdraw(state)
    assert (first.read_text(), second.read_text()) == (DOCUMENT, KUBECTL)
    assert not gone.exists()
    publish(env_of(gone, tmp_path / "gone2"), tmp_path / "other.json")
    assert (tmp_path / "gone2").exists() and not gone.exists()


def test_the_users_own_choice_since_then_is_kept(tmp_path: Path) -> None:
    path, state = tmp_path / "config", tmp_path / "kube.json"
    path.write_text(KUBECTL)
    publish(env_of(path), state)
    path.write_text(kubeconfig.set_current(path.read_text(), "prod2"))
    withdraw(state)
    assert path.read_text() == KUBECTL.replace("current-context: prod", "current-context: prod2")


def test_a_former_context_of_ours_that_is_gone_is_not_put_back(tmp_path: Path) -> None:
    path, state = tmp_path / "config", tmp_path / "kube.json"
    path.write_text(KUBECTL.replace("current-context: prod", "current-context: qvm-old"))
    publish(env_of(path), state)
    withdraw(state)
    assert 'current-context: ""' in path.read_text()


def test_nothing_is_switched_where_nobody_asked(tmp_path: Path) -> None:
    path, state = tmp_path / "config", tmp_path / "kube.json"
    path.write_text(KUBECTL)
    publish(env_of(path), state, switch=False)
    assert kubeconfig.current(path.read_text()) == ("prod", "prod")
    withdraw(state)
    assert path.read_text() == KUBECTL


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(KUBECTL)

    def come_and_stay(number: int) -> None:
        entries = build_entries(f"qvm-{number}", ACCESS, home=HOME)
        kubefiles.publish([path], entries, tmp_path / f"{number}.json", home=HOME, switch=False)

    threads = [threading.Thread(target=come_and_stay, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(kubeconfig.context_names(path.read_text())) == {"prod", *(f"qvm-{number}" for number in range(8))}
    for number in range(8):
        kubefiles.withdraw(f"qvm-{number}", tmp_path / f"{number}.json", home=HOME, drop=True)
    assert path.read_text() == KUBECTL


def test_a_lock_that_stays_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config"
    path.write_text(KUBECTL)
    (tmp_path / "config.lock").touch()
    monkeypatch.setattr(kubefiles, "LOCK_PATIENCE", 0.1)
    with pytest.raises(kubefiles.LockedError, match=r"config\.lock"):
        publish(env_of(path), tmp_path / "kube.json")
    assert path.read_text() == KUBECTL


def test_text_of_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_bytes(KUBECTL.encode("utf-16"))
    before = path.read_bytes()
    with pytest.raises(CannotEditError):
        publish(env_of(path), tmp_path / "kube.json")
    assert path.read_bytes() == before

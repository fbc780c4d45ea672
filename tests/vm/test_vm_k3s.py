"""Kubernetes in a real guest, by a real k3s: on containerd, and on docker."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import User, clear, fetch, make_user, wait_for
from k3s_parts import WEB, find_k3s, make_place

pytestmark = [pytest.mark.vm, pytest.mark.long, pytest.mark.timeout(1800)]

KUBECONFIG = """\
# mine
apiVersion: v1
kind: Config
clusters:
- cluster: {server: "https://prod.example:6443"}   # production
  name: prod
users: []
contexts:
- {name: prod, context: {cluster: prod, user: nobody}}
current-context: prod   # careful
"""
# The rest of k3s's own pods come from images that tests have no network for.
ARGS = ("--k3s-arg=--disable=coredns,traefik,servicelb,metrics-server,local-storage", "--mount", "none")
PAGE = "hello from a container\n"


@pytest.fixture
def user(cache_home: Path) -> Iterator[User]:
    binary = find_k3s(cache_home)
    person = make_user(cache_home)
    person.env["QVM_K3S"] = str(make_place(binary, person.home / "k3s"))
    (person.home / ".kube").mkdir()
    (person.home / ".kube" / "config").write_text(KUBECONFIG)
    yield person
    clear(person)


def kubectl(user: User, *argv: str, input: str = "") -> str:
    return user.qvm("ssh", "kube", "-T", "--", "sudo", "kubectl", *argv, input=input.encode()).stdout


def context(user: User) -> str:
    return str(yaml.safe_load((user.home / ".kube" / "config").read_text())["current-context"])


def make_project(user: User, busybox_tar: Path) -> Path:
    project = user.work / "project"
    project.mkdir()
    subprocess.run(["tar", "-C", project, "-xf", busybox_tar, "./bin/busybox", "./www"], check=True)
    (project / "Dockerfile").write_text("FROM scratch\nCOPY bin/busybox /bin/busybox\nCOPY www /www\n"
                                        'CMD ["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/www"]\n')
    return project


def test_on_containerd(user: User, busybox_tar: Path) -> None:
    user.qvm("start", "kube", "--kubernetes", *ARGS, timeout=1200)
    assert context(user) == "qvm-kube"
    assert "k3s v1." in user.status("kube")["runtime_version"]
    project = make_project(user, busybox_tar)
    send_project(user, project)
    user.qvm("ssh", "kube", "--", "sudo nerdctl -n k8s.io build -t site:1 /tmp/project", timeout=600)
    kubectl(user, "apply", "-f", "-", input=WEB.replace("IMAGE", "docker.io/library/site:1"))
    wait_for(lambda: fetch(30380) == PAGE, 180, "the NodePort at localhost")
    wait_for(lambda: fetch(8385) == PAGE, 30, "the LoadBalancer at localhost")
    kubectl(user, "delete", "service", "node", "--wait=false")
    wait_for(lambda: fetch(30380) is None, 20, "a service that is gone is not forwarded")

    user.qvm("kubernetes", "stop", "kube")
    assert context(user) == "prod" and fetch(8385) is None
    user.qvm("k3s", "start", "kube", timeout=900)
    assert context(user) == "qvm-kube"
    wait_for(lambda: fetch(8385) == PAGE, 180, "the pod runs again")
    user.qvm("kubernetes", "delete", "kube")
    assert (user.home / ".kube" / "config").read_text() == KUBECONFIG
    assert "k3s" not in user.status("kube")["runtime_version"]


def send_project(user: User, project: Path) -> None:
    """`--mount none` keeps the warm image that tests share usable; so the files go by the shell."""
    tar = subprocess.run(["tar", "-C", project, "-cf", "-", "."], check=True, capture_output=True).stdout
    user.qvm("ssh", "kube", "-T", "--", "mkdir -p /tmp/project && tar -C /tmp/project -xf -", input=tar)


def test_on_docker_an_image_that_is_built_runs_in_a_pod(user: User, busybox_tar: Path) -> None:
    user.qvm("start", "kube", "--runtime", "docker", "--kubernetes", *ARGS, timeout=1200)
    user.docker("--context", "qvm-kube", "build", "-t", "site:1", str(make_project(user, busybox_tar)))
    kubectl(user, "apply", "-f", "-", input=WEB.replace("IMAGE", "site:1"))
    wait_for(lambda: fetch(30380) == PAGE, 180, "the NodePort at localhost")
    user.qvm("delete", "kube", "-f")
    assert (user.home / ".kube" / "config").read_text() == KUBECONFIG

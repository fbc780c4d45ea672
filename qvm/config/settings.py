"""THE table of settings: what can be wished for, how it is spelled everywhere, and what holds where nothing is said.

One row drives the flags of `qvm start`, shell completion, the profile file's loader, the JSON Schema and the table in
the documentation. A new setting is a new row (and a field of `qvm.config.model.Config`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qvm.arch import ALL, host_arch
from qvm.config import validate
from qvm.config.context import Context, Problem
from qvm.config.dns import Domains, validate_dns_domains, validate_dns_hosts, validate_gateway_address
from qvm.config.kinds import ArchName, Count, ImageName, Kind, Mounts, Size, Switch, Text, TextList, Variables
from qvm.config.names import DEFAULT_PROFILE
from qvm.config.network import (
    Files,
    Proxies,
    Section,
    validate_ca_certs,
    validate_mirrors,
    validate_proxies,
    validate_registries,
)
from qvm.config.ports import Forwards, validate_rules
from qvm.units import GiB


class Change(enum.Enum):
    """What may become of a setting once the instance exists."""

    FREE = "at the next start"
    GROWS = "grows only"
    SWITCHES = "at the next start; not by the environment"
    FIXED = "fixed after creation"


def _nothing_wrong(value: Any, context: Context) -> list[Problem]:
    return []


def _no_remark(value: Any, context: Context) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Setting:
    """One row."""

    key: str
    """In the profile file."""
    field: str
    """Of Config."""
    kind: Kind
    flags: tuple[str, ...]
    """Short first; for a switch `--on/--off`; none where only a file or a program can say it."""
    metavar: str
    help: str
    example: str
    """A value as it is typed after the flag."""
    default: Callable[[Context], Any]
    default_text: str
    """The default for people."""
    env: str | None = None
    """The environment variable that may give it."""
    change: Change = Change.FREE
    sticky: bool = False
    """The default depends on where the first start was typed: later starts keep what it was."""
    choices: Callable[[], Sequence[str]] | None = None
    """The only values there are; asked late, for it may be costly."""
    validate: Callable[[Any, Context], list[Problem]] = _nothing_wrong
    remark: Callable[[Any, Context], str | None] = _no_remark
    """A note on a value that is allowed; told of explicit values."""
    remark_default: Callable[[Any, Context], str | None] = _no_remark
    """A note on the value that came about by default."""

    @property
    def flag(self) -> str:
        """The long flag, for messages; the key of what only files and programs can say."""
        return self.flags[-1].split("/")[0] if self.flags else self.key


def default_hostname(context: Context) -> str:
    """`qvm` for the default profile, else `qvm-<profile>` with what host names may not hold replaced."""
    if context.profile == DEFAULT_PROFILE:
        return "qvm"
    return "qvm-" + context.profile.replace("_", "-").replace(".", "-").rstrip("-")


def _runtime_names() -> Sequence[str]:
    # Reading the metadata of installed packages costs more than all of `--help`.
    from qvm.config.plugins import list_runtime_names

    return list_runtime_names()


def _validate_runtime(value: str, context: Context) -> list[Problem]:
    from difflib import get_close_matches

    names = _runtime_names()
    if value in names:
        return []
    near = get_close_matches(value, names, 1)
    ask = f"did you mean {near[0]}? " if near else ""
    return [Problem(f"there is no runtime {value!r}; {ask}there are: {', '.join(names)}")]


ACCELERATORS = ("auto", "kvm", "hvf", "tcg")


def _validate_accel(value: str, context: Context) -> list[Problem]:
    return [] if value in ACCELERATORS else [Problem(f"{value!r} is not one of {', '.join(ACCELERATORS)}")]


PORT_FORWARDERS = ("auto", "user", "ssh", "none")


def _validate_port_forwarder(value: str, context: Context) -> list[Problem]:
    return [] if value in PORT_FORWARDERS else [Problem(f"{value!r} is not one of {', '.join(PORT_FORWARDERS)}")]


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "cpus", "cpus", Count(), ("-c", "--cpus"), "N", "virtual CPUs", "4",
        default=lambda context: 2, default_text="2",
        validate=validate.validate_cpus, remark=validate.remark_cpus,
    ),
    Setting(
        "memory", "memory", Size(), ("-m", "--memory"), "GiB", "memory, in GiB or with a unit", "4GiB",
        default=lambda context: min(2 * GiB, validate.host_memory()), default_text="2GiB",
        validate=validate.validate_memory,
    ),
    Setting(
        "disk", "disk", Size(), ("-d", "--disk"), "GiB", "data disk: images, volumes; survives `qvm delete`", "60GiB",
        default=lambda context: 100 * GiB, default_text="100GiB", change=Change.GROWS,
        validate=validate.validate_disk,
    ),
    Setting(
        "rootDisk", "root_disk", Size(), ("--root-disk",), "GiB", "root disk: the guest's system", "30GiB",
        default=lambda context: 20 * GiB, default_text="20GiB", change=Change.GROWS,
        validate=validate.validate_disk,
    ),
    Setting(
        "arch", "arch", ArchName(), ("-a", "--arch"), "ARCH",
        "the guest's architecture; all but the host's are emulated", "aarch64",
        default=lambda context: host_arch().name, default_text="host", change=Change.FIXED,
        choices=lambda: ("host", *(arch.name for arch in ALL)),
    ),
    Setting(
        "runtime", "runtime", Text(), ("-r", "--runtime"), "NAME", "what runs containers", "docker",
        default=lambda context: "containerd", default_text="containerd", env="QVM_DEFAULT_RUNTIME",
        change=Change.SWITCHES, choices=_runtime_names, validate=_validate_runtime,
    ),
    Setting(
        "accel", "accel", Text(), ("--accel",), "NAME", "accelerator; `auto` takes what is proven to work", "tcg",
        default=lambda context: "auto", default_text="auto",
        choices=lambda: ACCELERATORS, validate=_validate_accel,
    ),
    Setting(
        "image", "image", ImageName(), ("-i", "--image"), "IMAGE",
        "name (`qvm image list`), file, or address with digest of the disk to begin with", "debian-13",
        default=lambda context: "debian-13", default_text="debian-13", change=Change.FIXED,
        validate=validate.validate_image,
    ),
    Setting(
        "mounts", "mounts", Mounts(), ("-V", "--mount"), "SRC[:DST][:ro][:mmap]",
        "host folder in the VM, writable unless :ro; :mmap for SQLite's WAL; repeatable; `none` for none",
        "~/src:/src:ro",
        default=validate.default_mounts, default_text="the working directory, at the same path", sticky=True,
        validate=validate.validate_mounts, remark_default=validate.remark_default_mounts,
    ),
    Setting(
        "mountInotify", "mount_inotify", Switch(), ("--mount-inotify/--no-mount-inotify",), "",
        "tell programs in the VM that watch mounted folders of the host's changes", "",
        default=lambda context: False, default_text="false",
    ),
    Setting(
        "portForwards", "port_forwards", Forwards(), ("--publish",), "[ADDR:]PORT:[ADDR:]PORT[/udp]",
        "forward rule HOST:GUEST, or ignore:GUEST, or reverse:HOST:GUEST; sockets by their paths; repeatable",
        "8080:80",
        default=lambda context: (), default_text="every listener, at the same port of 127.0.0.1",
        validate=validate_rules,
    ),
    Setting(
        "portForwarder", "port_forwarder", Text(), ("--port-forwarder",), "NAME",
        "way of forwarded ports: QEMU's user network where it can (user), SSH, or what rules say only (none)", "user",
        default=lambda context: "auto", default_text="auto",
        choices=lambda: PORT_FORWARDERS, validate=_validate_port_forwarder,
    ),
    Setting(
        "dns", "dns", TextList(), ("-n", "--dns"), "IP", "name server; repeatable", "1.1.1.1",
        default=lambda context: (), default_text="the host's", validate=validate.validate_dns,
    ),
    Setting(
        "dnsHosts", "dns_hosts", Variables(), ("--dns-host",), "NAME=ADDR",
        "name that VM and containers know; *.NAME for all below it; repeatable", "api.test=10.1.2.3",
        default=lambda context: {}, default_text="none", validate=validate_dns_hosts,
    ),
    Setting(
        "dnsDomains", "dns_domains", Domains(), ("--dns-domain",), "DOMAIN=IP",
        "name server for a domain and what is below it; repeatable", "corp.example=10.1.2.3",
        default=lambda context: {}, default_text="as the host has it", validate=validate_dns_domains,
    ),
    Setting(
        "hostLoopback", "host_loopback", Switch(), ("--host-loopback/--no-host-loopback",), "",
        "let VM and containers reach services on the host's loopback (host.docker.internal)", "",
        default=lambda context: True, default_text="true",
    ),
    Setting(
        "gatewayAddress", "gateway_address", Text(), ("--gateway-address",), "IP",
        "address at which VM and containers reach the host", "192.168.5.2",
        default=lambda context: "10.0.2.2", default_text="10.0.2.2", validate=validate_gateway_address,
    ),
    Setting(
        "networkAddress", "network_address", Switch(), ("--network-address/--no-network-address",), "",
        "give the VM an address at which other VMs reach it", "",
        default=lambda context: False, default_text="false",
    ),
    Setting(
        "forwardAgent", "forward_agent", Switch(), ("-s", "--ssh-agent/--no-ssh-agent"), "",
        "let VM and containers use your SSH agent", "",
        default=lambda context: False, default_text="false",
    ),
    Setting(
        "env", "env", Variables(), ("--env",), "KEY=VALUE", "environment variable in the VM; repeatable", "CI=true",
        default=lambda context: {}, default_text="none", validate=validate.validate_env,
    ),
    Setting(
        "docker", "docker", Section(), (), "", "dockerd's settings, as in its daemon.json", "",
        default=lambda context: {}, default_text="qvm's own",
    ),
    Setting(
        "containerd", "containerd", Section(), (), "", "containerd's settings, as in its config.toml", "",
        default=lambda context: {}, default_text="qvm's own",
    ),
    Setting(
        "podman", "podman", Section(), (), "", "podman's settings, as in its containers.conf", "",
        default=lambda context: {}, default_text="qvm's own",
    ),
    Setting(
        "registryMirrors", "registry_mirrors", TextList(), ("--registry-mirror",), "URL",
        "asked for Docker Hub's images first; repeatable", "https://mirror.example",
        default=lambda context: (), default_text="none", validate=validate_mirrors,
    ),
    Setting(
        "insecureRegistries", "insecure_registries", TextList(), ("--insecure-registry",), "HOST[:PORT]",
        "registry without TLS, or with a certificate nobody vouches for; repeatable", "registry.example:5000",
        default=lambda context: (), default_text="none", validate=validate_registries,
    ),
    Setting(
        "proxies", "proxies", Proxies(), (), "",
        "proxies for the VM: http, https, all, no; `none` for none; a loopback address means the host's", "",
        default=lambda context: None, default_text="the host's environment", validate=validate_proxies,
    ),
    Setting(
        "caCerts", "ca_certs", Files(), ("--ca-cert",), "FILE",
        "PEM file of certificate authorities that the VM trusts; `host` for those added to this host; repeatable",
        "~/corp-ca.pem",
        default=lambda context: (), default_text="none", validate=validate_ca_certs,
    ),
    Setting(
        "hostname", "hostname", Text(), ("--hostname",), "NAME", "host name of the VM", "build.example",
        default=default_hostname, default_text="qvm, or qvm-PROFILE", validate=validate.validate_hostname,
    ),
    Setting(
        "sshPort", "ssh_port", Count(), ("--ssh-port",), "PORT", "port of 127.0.0.1 for SSH; 0: any free one", "2222",
        default=lambda context: 0, default_text="0", validate=validate.validate_ssh_port,
    ),
    Setting(
        "sshConfig", "ssh_config", Switch(), ("--ssh-config/--no-ssh-config",), "",
        "have ~/.ssh/config include the VM, for `ssh qvm-PROFILE`", "",
        default=lambda context: False, default_text="false",
    ),
    Setting(
        "autoActivate", "activate", Switch(), ("--activate/--no-activate",), "",
        "make it the current docker context", "",
        default=lambda context: True, default_text="true",
    ),
    Setting(
        "binfmt", "binfmt", Switch(), ("--binfmt/--no-binfmt",), "",
        "run programs and containers of other architectures, emulated", "",
        default=lambda context: True, default_text="true",
    ),
    Setting(
        "kubernetes", "kubernetes", Switch(), ("-k", "--kubernetes/--no-kubernetes"), "",
        "Kubernetes (k3s) on top of docker or containerd", "",
        default=lambda context: False, default_text="false",
    ),
    Setting(
        "kubernetesVersion", "kubernetes_version", Text(), ("--kubernetes-version",), "VERSION",
        "release of k3s (v1.34.3+k3s1), of Kubernetes (v1.34.3) or channel (stable, latest, v1.34)", "v1.34.3+k3s1",
        default=lambda context: "", default_text="the one this qvm was made with",
        validate=validate.validate_kubernetes_version,
    ),
    Setting(
        "k3sArgs", "k3s_args", TextList(), ("--k3s-arg",), "ARG", "further argument of `k3s server`; repeatable",
        "--disable=traefik",
        default=lambda context: (), default_text="none", validate=validate.validate_k3s_args,
    ),
    Setting(
        "k3sListenPort", "k3s_listen_port", Count(), ("--k3s-listen-port",), "PORT",
        "port of 127.0.0.1 for the Kubernetes API; 0: any free one", "6443",
        default=lambda context: 0, default_text="0", validate=validate.validate_ssh_port,
    ),
)  # fmt: skip

BY_KEY = {setting.key: setting for setting in SETTINGS}
BY_FIELD = {setting.field: setting for setting in SETTINGS}


def find_setting(name: str) -> Setting | None:
    """The row with that file key or Config field."""
    return BY_KEY.get(name) or BY_FIELD.get(name)

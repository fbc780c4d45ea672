"""What k3s needs in the guest: files as pure text, and the scripts that are run there.

One node needs no overlay network: a bridge of the reference CNI plugins, which the image has, does what flannel would
do, with nothing running for it. Addresses are those of a cluster's first node (10.42.0.0/24 of k3s's 10.42.0.0/16).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath

NODE = "qvm"
"""The same in every VM: a fork has another host name than the machine in which its node came up."""
API_PORT = 6443
PORTS = (API_PORT, 6444, 10010, *range(10248, 10261))
"""Of the API server and its local balancer, containerd's streams, and the parts of Kubernetes among themselves."""
BINARY = PurePosixPath("/usr/local/bin/k3s")
STAMP = PurePosixPath("/usr/local/lib/qvm/k3s")
"""Digest of the binary that is there, and its version."""
UNIT = PurePosixPath("/etc/systemd/system/k3s.service")
TIMER_SLACK = 100_000_000
"""Nanoseconds by which the kernel may be late with k3s's timers once it runs, so that it rings many at a time.

k3s has thousands: an idle one woke 900 times a second, which took half a core under software emulation. None of them is
about less than a second. (While k3s starts it is as quick as it can be.)"""
KUBECONFIG = PurePosixPath("/etc/rancher/k3s/k3s.yaml")
CNI_CONF = {"containerd": PurePosixPath("/etc/cni/k3s"), "docker": PurePosixPath("/etc/cni/net.d")}
CNI_BIN = PurePosixPath("/opt/cni/bin")
IMAGES = PurePosixPath("/var/lib/rancher/k3s/qvm-images")
"""Stamps of archives that have been imported; with the images themselves on the data disk."""
DATA = (PurePosixPath("/var/lib/rancher"), PurePosixPath("/etc/rancher"), PurePosixPath("/var/lib/kubelet"))
PAUSE = "rancher/mirrored-pause:3.6"
DISABLED = ("traefik",)
"""Left out unless asked for: it takes the ports 80 and 443 of the host."""

LOOK = f"""
cat {STAMP} 2>/dev/null || echo none
ls {IMAGES} 2>/dev/null | sed 's/^/image /'
[ -S /run/systemd/private ] && systemctl is-active --quiet k3s && echo running
for folder in /usr/lib/cni /opt/cni/bin /usr/libexec/cni; do [ -x $folder/bridge ] && echo cni $folder; done
exit 0
"""

PREPARE = f"""
set -e
mkdir -p {IMAGES} {STAMP.parent} {CNI_BIN.parent}
[ "$1" = {CNI_BIN} ] || [ -e {CNI_BIN} ] || ln -s "$1" {CNI_BIN}
for name in kubectl crictl ctr-k3s; do ln -sf k3s {BINARY.parent}/$name; done
rm -f {BINARY.parent}/ctr-k3s
systemctl daemon-reload
"""

IMPORT = {
    # All platforms that the archive has, which is one; `ctr` takes zstd and gzip by itself.
    "containerd": 'ctr --namespace k8s.io images import --all-platforms "$1" >/dev/null',
    "docker": 'docker load --quiet --input "$1" >/dev/null',
}
IMPORTED = f'set -e; {{}}; rm -f "$1"; : >{IMAGES}/"$2"'

# Of the API itself, with the administrator's certificate: kubectl takes seconds to start under software emulation.
_API = f"""
tls=/var/lib/rancher/k3s/server/tls
ask() {{
    curl -sf --max-time 4 --cacert $tls/server-ca.crt --cert $tls/client-admin.crt --key $tls/client-admin.key \\
        "https://127.0.0.1:{API_PORT}$1"
}}
"""
NODE_READY = _API + f"""
end=$(($(date +%s) + 4))
while [ "$(date +%s)" -lt $end ]; do
    ask /api/v1/nodes/{NODE} | tr -d ' \\n' | grep -q '"type":"Ready","status":"True"' && exit 0
    sleep 0.3
done
exit 1
"""
# Without it no pod is admitted; a controller makes it a moment after the namespace.
ACCOUNT_READY = _API + """
ask /api/v1/namespaces/default/serviceaccounts/default >/dev/null
"""

# `KillMode=process` leaves the containers of pods running, so that k3s can be started anew without them noticing.
KILL_PODS = {
    "containerd": """
for task in $(ctr --namespace k8s.io tasks list -q); do ctr --namespace k8s.io tasks kill -s SIGKILL "$task"; done
for container in $(ctr --namespace k8s.io containers list -q); do
    n=0
    until ctr --namespace k8s.io containers delete "$container" 2>/dev/null; do
        [ $((n += 1)) -gt 20 ] && break
        sleep 0.2
    done
done
""",
    "docker": """
pods=$(docker ps -aq --filter name=^k8s_)
[ -z "$pods" ] || docker rm -f $pods >/dev/null
""",
}
UNMOUNT = """
awk '$5 ~ "^/var/lib/kubelet/|^/run/k3s/" {print $5}' /proc/self/mountinfo | sort -r | while read -r at; do
    umount -l "$at"
done
for link in cni0; do ip link delete $link 2>/dev/null; done
rm -rf /run/cni/networks/k3s
exit 0
"""
WIPE = """
rm -rf /var/lib/rancher/k3s/server /var/lib/rancher/k3s/agent /etc/rancher/k3s /etc/rancher/node
find /var/lib/kubelet -mindepth 1 -delete 2>/dev/null
exit 0
"""
# Authorities, certificates and tokens go; the database follows these files. The node's own password stays, by which the
# cluster knows it: it is good for nothing without a token.
FORGET_KEYS = """
set -e
cd /var/lib/rancher/k3s
rm -rf server/tls server/cred server/token server/agent-token server/node-token
rm -f agent/*.crt agent/*.key agent/*.kubeconfig /etc/rancher/k3s/k3s.yaml
"""

# `$$` is systemd's for a `$` of the shell's.
_SLACKEN = f"for task in /proc/$MAINPID/task/*; do echo {TIMER_SLACK} >/proc/$${{task##*/}}/timerslack_ns; done"


def unit(args: Sequence[str], *, primary: str) -> bytes:
    line = " ".join(_quote(word) for word in args)
    return f"""[Unit]
Description=Kubernetes (k3s)
After=network-online.target {primary}.service
Wants=network-online.target

[Service]
Type=notify
KillMode=process
Delegate=yes
LimitNOFILE=1048576
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
TimeoutStartSec=0
Restart=on-failure
RestartSec=5s
Environment=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:{CNI_BIN}
ExecStart={BINARY} {line}
ExecStartPost=-/bin/sh -c '{_SLACKEN}'
""".encode()


def _quote(word: str) -> str:
    """systemd.service(5), "Command lines": `%` and `$` are its own."""
    return shlex.quote(word.replace("%", "%%").replace("$", "$$"))


def server_args(primary: str, extra: Sequence[str]) -> list[str]:
    """The command line of k3s. What the user adds comes last, and wins where an option counts once.

    A user who chooses what is disabled chooses all of it.
    """
    # Of a containerd that is not its own k3s does not ask how it makes cgroups.
    runtime = ["--docker"] if primary == "docker" else [
        "--container-runtime-endpoint=unix:///run/containerd/containerd.sock", "--kubelet-arg=cgroup-driver=systemd",
    ]
    chosen = any(word.split("=")[0] == "--disable" for word in extra)
    return [
        "server", f"--node-name={NODE}", f"--https-listen-port={API_PORT}", "--flannel-backend=none",
        "--disable-network-policy", "--write-kubeconfig-mode=600", "--tls-san=localhost",
        f"--pause-image={PAUSE}", *runtime,
        *([] if chosen else [f"--disable={name}" for name in DISABLED]),
        *[word for word in extra if word not in ("--disable=none", "--disable=")],
    ]


def network() -> bytes:
    """The CNI configuration of pods: a bridge, addresses of the first node, and host ports."""
    return (json.dumps({
        "cniVersion": "1.0.0",
        "name": "k3s",
        "plugins": [
            {
                "type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": True, "hairpinMode": True,
                "ipam": {"type": "host-local", "dataDir": "/run/cni/networks",
                         "ranges": [[{"subnet": "10.42.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]},
            },
            {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
            {"type": "firewall"},
        ],
    }, indent=2) + "\n").encode()


def containerd_settings() -> dict[str, object]:
    """What containerd must serve for k3s: its Kubernetes interface (config version 2)."""
    return {
        "disabled_plugins": [],
        "plugins": {
            "io.containerd.grpc.v1.cri": {
                "sandbox_image": PAUSE,
                "stream_server_address": "127.0.0.1",
                "cni": {"bin_dir": str(CNI_BIN), "conf_dir": str(CNI_CONF["containerd"])},
                "registry": {"config_path": "/etc/containerd/certs.d"},
                "containerd": {"runtimes": {"runc": {
                    "runtime_type": "io.containerd.runc.v2", "options": {"SystemdCgroup": True},
                }}},
            },
        },
    }

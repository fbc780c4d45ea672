"""VMs of another architecture: how long they take, which of QEMU's settings pay, and what a compiler takes in them.

    python benchmarks/arch.py [--arch aarch64] [--rounds 3] [--only starts,settings,compile] [--variant NAME=OLD>NEW]

`starts`     cold and forked starts to `docker info`, and `qvm run`: whole commands, seconds
`settings`   boots of the image with QEMU's command line changed, one after the other in turns: CPU seconds of QEMU,
             which other work on the host disturbs less than time, until the agent answers, and for a small workload
`compile`    Lua's sources by gcc -O2: in a VM of the host's architecture, in one of the other, in a container by binfmt

Compare figures of one run only: machines differ, and the same machine differs by the hour.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from common import QVM, machine, row, run, scratch_home, summary, timed

from qvm.arch import Arch, find_arch, host_arch
from qvm.errors import QvmError
from qvm.guest.channel import AgentChannel
from qvm.image.disk import create_overlay
from qvm.image.ensure import ensure_image
from qvm.image.store import Image
from qvm.instance.kernel import kernel_cmdline
from qvm.instance.spec import Disk, InstanceSpec, KernelBoot
from qvm.progress import NullProgress
from qvm.qemu.cmdline import build_argv
from qvm.qemu.probe import probe_qemu
from qvm.units import GiB

WORK = """for i in 1 2 3 4 5 6 7 8 9 10; do true; /bin/true; done; python3 -c 'print(sum(i*i for i in range(200000)))'
seq 1 20000 | sort -r | gzip | sha256sum; openssl version; systemctl list-units --all | wc -l"""

# name -> [(old, new)] on the words of QEMU's command line
VARIANTS: dict[str, dict[str, list[tuple[str, str]]]] = {
    "aarch64": {
        "as qvm has it": [],
        "-cpu max alone": [("CPU", "max")],
        "-cpu max,pauth-impdef=on": [("CPU", "max,pauth-impdef=on")],
        "-cpu max,pauth=off": [("CPU", "max,pauth=off")],
        "-cpu max,pauth=off,lpa2=off,sve=off": [("CPU", "max,pauth=off,lpa2=off,sve=off")],
        "-cpu cortex-a57": [("CPU", "cortex-a57")],
        "-cpu cortex-a76": [("CPU", "cortex-a76")],
        "-cpu neoverse-n1": [("CPU", "neoverse-n1")],
        "gic-version=2": [("gic-version=3", "gic-version=2")],
        "its=off": [("gic-version=3", "gic-version=3,its=off")],
        "thread=single": [("thread=multi", "thread=single")],
        "tb-size=128": [("tb-size=512", "tb-size=128")],
        "addresses random": [("norandmaps", "")],
    },
    "riscv64": {"as qvm has it": [], "sstc=off": [("CPU", "rv64,sstc=off")], "tb-size=128": [("=512", "=128")]},
    "ppc64le": {"as qvm has it": [], "power8": [("CPU", "power8")], "power10": [("CPU", "power10")]},
    "s390x": {"as qvm has it": [], "qemu": [("CPU", "qemu")], "tb-size=128": [("=512", "=128")]},
    "armv7l": {"as qvm has it": [], "cortex-a15": [("CPU", "cortex-a15")], "gic 2": [("version=3", "version=2")]},
}


def seconds(values: list[float]) -> str:
    median, least, most = summary(values)
    return f"{median:.1f} ({least:.1f}-{most:.1f}) s"


def starts(arch: Arch, rounds: int) -> None:
    with scratch_home() as env:
        start = [QVM, "start", "bench", "--mount", "none", "--arch", arch.name, "--runtime", "docker"]
        done: dict[str, list[float]] = {"cold": [], "fork": [], "run": []}
        run([*start], env)  # makes the warm image
        run([QVM, "delete", "bench", "-f", "--data"], env)
        once = [QVM, "run", "--arch", arch.name, "--mount", "none", "--", "true"]
        run(once, env)
        for _ in range(rounds):
            for name, more in (("cold", ["--cold"]), ("fork", [])):
                began = time.perf_counter()
                run([*start, *more], env)
                whole = time.perf_counter() - began
                run(["docker", "info"], env)
                done[name].append(time.perf_counter() - began if name == "cold" else whole)
                run([QVM, "delete", "bench", "-f", "--data"], env)
            done["run"].append(timed(lambda: run(once, env)))
        row(f"{arch.name}: cold, to docker answering", seconds(done["cold"]), "goal 35 s (aarch64)")
        row(f"{arch.name}: fork, whole command", seconds(done["fork"]), "goal 2.0 s (aarch64)")
        row(f"{arch.name}: qvm run -- true", seconds(done["run"]), "goal 1.5 s (aarch64)")


@contextmanager
def scratch_spec(image: Image, arch: Arch) -> Iterator[InstanceSpec]:
    with tempfile.TemporaryDirectory(prefix="qvmb", dir="/tmp") as name:
        folder = Path(name)
        assert image.kernel is not None and image.initrd is not None
        create_overlay(folder / "root", backing=image.disk, backing_format=image.format, size=20 * GiB)
        yield InstanceSpec(
            name="bench", uuid="00000000-0000-4000-8000-000000000000", arch=arch.name, accel="tcg", cpus=2,
            memory=2 * GiB, disks=(Disk(folder / "root", "root"),), mounts=(), mac="52:54:00:00:00:01", ssh_port=0,
            monitor_socket=folder / "m", agent_socket=folder / "a", stream_socket=folder / "s",
            serial_log=folder / "serial.log",
            boot=KernelBoot(image.kernel, image.initrd, kernel_cmdline(image.cmdline, arch, "tcg")),
        )


async def boot(argv: list[str], spec: InstanceSpec) -> tuple[float, float, float]:
    """(CPU seconds of QEMU until its agent answers, CPU seconds for the workload, seconds until the agent answers)."""
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=sys.stderr)

    def used() -> float:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) / 100

    began = time.perf_counter()
    channel = AgentChannel()
    try:
        while not spec.agent_socket.exists():
            await asyncio.sleep(0.05)
        await channel.connect(spec.agent_socket)
        await channel.hello(timeout=300.0)
        booted, took = used(), time.perf_counter() - began
        # What a boot has left to do is not the workload's.
        await channel.exec(["systemctl", "is-system-running", "--wait"], check=False, timeout=300.0)
        before = used()
        await channel.exec(["sh", "-c", WORK], check=False, timeout=300.0)
        return booted, used() - before, took
    finally:
        await channel.close()
        child.kill()
        child.wait()


def change(argv: list[str], changes: list[tuple[str, str]], cpu: str) -> list[str]:
    for old, new in changes:
        wanted = cpu if old == "CPU" else old
        if not any(wanted in word for word in argv):
            print(f"(nothing to change: {wanted!r} is not on the command line)")
        argv = [new if old == "CPU" and word == cpu else word.replace(wanted, new) if old != "CPU" else word
                for word in argv]  # fmt: skip
    return argv


def settings(arch: Arch, rounds: int, more: dict[str, list[tuple[str, str]]]) -> None:
    image, features = ensure_image("debian-13", arch, progress=NullProgress()), probe_qemu(arch)
    variants = {**VARIANTS.get(arch.name, {"as qvm has it": []}), **more} if not more else {"as qvm has it": [], **more}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in variants}
    print(f"QEMU {features.version_text}; CPU seconds until the agent answers, for the workload; seconds of time")
    for _ in range(rounds):
        for name, changes in variants.items():
            with scratch_spec(image, arch) as spec:
                argv = change(build_argv(replace(spec), features), changes, arch.tcg_cpu)
                try:
                    found[name].append(asyncio.run(boot(argv, spec)))
                except (QvmError, OSError) as error:
                    print(f"{name}: {error}", flush=True)
    for name, values in found.items():
        if values:
            cpu, work, took = (statistics.median(column) for column in zip(*values, strict=True))
            print(f"{name:<44} {cpu:8.1f} {work:8.1f} {took:8.1f}   ({len(values)} boots)", flush=True)


SOURCE = "https://deb.debian.org/debian/pool/main/l/lua5.4/lua5.4_5.4.7.orig.tar.gz"
COMPILE = "cd /tmp/lua*/src && gcc -O2 -c -DLUA_USE_POSIX l*.c && rm -f *.o"
PREPARE = ("sudo apt-get -qq update && sudo apt-get -qq install -y --no-install-recommends gcc libc6-dev && "
           f"cd /tmp && curl -fsS {SOURCE} | tar -xz")  # fmt: skip


def compile_times(arch: Arch) -> None:
    """The container is the other VM's own root file system, so compiler and libraries are the same."""
    home = host_arch()
    with scratch_home() as env:
        for each in (home, arch):
            run([QVM, "start", each.name, "--mount", "none", "--arch", each.name, "--runtime", "docker"], env)
            run([QVM, "ssh", each.name, "--", PREPARE], env)
            inside = lambda name=each.name: run([QVM, "ssh", name, "--", COMPILE], env)  # noqa: E731
            row(f"VM of {each.name}", f"{timed(inside):.1f} s")
        tar = Path(env["QVM_HOME"]).parent / "far.tar"
        pack = "sudo tar -C / --one-file-system --exclude=./var/lib/docker --exclude=./proc --exclude=./sys -cf - ."
        with tar.open("wb") as file:
            subprocess.run([QVM, "ssh", arch.name, "--", pack], env=env, stdout=file, check=True)
        run([QVM, "stop", arch.name], env)
        context = json.loads(run([QVM, "status", home.name, "--json"], env))["result"]["sockets"]["docker"]
        docker = ["docker", "-H", f"unix://{context}"]
        run([*docker, "import", "--platform", arch.oci_platform, str(tar), "far"], env)
        argv = [*docker, "run", "--rm", "--platform", arch.oci_platform, "far", "sh", "-c"]
        empty = timed(lambda: run([*argv, "true"], env))
        took = timed(lambda: run([*argv, COMPILE], env))
        row(f"container of {arch.name} by binfmt, in the VM of {home.name}", f"{took - empty:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="aarch64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="starts,settings,compile")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=OLD>NEW",
                        help="a change of QEMU's words, in place of those listed; OLD may be CPU")  # fmt: skip
    arguments = parser.parse_args()
    arch = find_arch(arguments.arch)
    if arch is None:
        raise SystemExit(f"unknown architecture {arguments.arch}")
    more = {}
    for text in arguments.variant:
        name, _, edit = text.partition("=")
        old, _, new = edit.partition(">")
        more[name] = [(old, new)]
    wanted = arguments.only.split(",")
    print(f"{machine()}; {arch.name} guests", flush=True)
    if "starts" in wanted:
        starts(arch, arguments.rounds)
    if "settings" in wanted:
        settings(arch, arguments.rounds, more)
    if "compile" in wanted:
        compile_times(arch)


if __name__ == "__main__":
    main()

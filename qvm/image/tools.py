"""nerdctl, buildctl and buildkitd: from their release archives, else built by an installed Go tool.

Both ways are verified: an archive by the digest pinned in images/tools.yaml, a module by Go's checksum database.
Finished programs stay in the cache by name, version and architecture.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qvm import locks, paths, process
from qvm.arch import Arch
from qvm.errors import ImageError, QvmError
from qvm.image.download import download
from qvm.image.recipe import Tool
from qvm.progress import Progress


@dataclass(frozen=True, slots=True)
class BuiltTool:
    name: str
    version: str
    source: str
    """"release archive" or "go module"."""
    path: Path


def tools_dir() -> Path:
    return paths.cache_home() / "tools"


def ensure_tools(wanted: Sequence[Tool], arch: Arch, *, progress: Progress) -> list[BuiltTool]:
    """Every tool as a program in the cache. Raises ImageError naming what would help where one cannot be had."""
    with locks.lock(paths.cache_home() / "tools.lock", what="nerdctl and buildkit", on_wait=progress.note):
        try:
            return [_ensure(tool, arch, progress) for tool in wanted]
        finally:
            for archive in tools_dir().glob("*.tar.gz"):
                archive.unlink()  # kept only as long as several tools come from one


def _ensure(tool: Tool, arch: Arch, progress: Progress) -> BuiltTool:
    stem = f"{tool.name}-{tool.version}-{arch.debian}"
    for source, suffix in (("release archive", "archive"), ("go module", "go")):
        path = tools_dir() / f"{stem}.{suffix}"
        if path.is_file():
            return BuiltTool(tool.name, tool.version, source, path)
    paths.ensure_private_dir(tools_dir())
    reasons = []
    if arch.name in tool.archives:
        try:
            return _from_archive(tool, arch, tools_dir() / f"{stem}.archive", progress)
        except QvmError as error:
            reasons.append(error.message)
            progress.note(f"{tool.name} {tool.version}: {error.message}; trying the Go tool")
    go = process.find_program("go", Path("/usr/local/go/bin"))
    if go is None:
        reasons.append("Go is not installed")
        raise ImageError(
            f"cannot get {tool.name} {tool.version} for {arch.name}", details="\n".join(reasons),
            hint="set QVM_MIRROR to a mirror of github.com's releases, or install Go (https://go.dev/dl/)",
        )  # fmt: skip
    return _from_module(tool, arch, go, tools_dir() / f"{stem}.go", progress)


def _from_archive(tool: Tool, arch: Arch, target: Path, progress: Progress) -> BuiltTool:
    archive = tool.archives[arch.name]
    packed = tools_dir() / archive.url.rpartition("/")[2]
    download(archive.url, f"sha256:{archive.sha256}", packed, progress=progress)
    partial = target.with_suffix(".partial")
    try:
        with tarfile.open(packed) as bundle:
            member = bundle.extractfile(archive.path)
            if member is None:
                raise ImageError(f"{archive.url} holds no file {archive.path}")
            with member, partial.open("wb") as file:
                shutil.copyfileobj(member, file)
    except (KeyError, tarfile.TarError) as error:
        raise ImageError(f"{archive.url} holds no readable {archive.path}: {error}") from error
    return _finish(tool, "release archive", partial, target)


def go_build_argv(tool: Tool, go: Path, output: Path) -> list[str]:
    """The compiler's command line, to be run in the module's own folder. Pure."""
    flags = f"-s -w -X {tool.stamp}=v{tool.version}"
    return [os.fspath(go), "build", "-mod=readonly", "-trimpath", "-buildvcs=false", f"-ldflags={flags}",
            "-o", os.fspath(output), f"./{tool.package}"]  # fmt: skip


def _from_module(tool: Tool, arch: Arch, go: Path, target: Path, progress: Progress) -> BuiltTool:
    """Build in the downloaded module's folder, not by `go install module@version`: so the module's own go.sum, replace
    and exclude lines count, exactly as in its release.
    """
    environment = {"CGO_ENABLED": "0", "GOOS": "linux", "GOFLAGS": "", "GOWORK": "off", **arch.go_environment}
    with progress.step(f"compiling {tool.name} {tool.version} for {arch.name}") as step:
        try:
            step.detail("fetching the module")
            found = process.run([go, "mod", "download", "-json", f"{tool.module}@v{tool.version}"], env=environment,
                                cwd=Path(tempfile.gettempdir()), check=False)
            answer = json.loads(found.stdout or b"{}")
            if found.returncode or "Dir" not in answer:
                reason = answer.get("Error") or found.stderr.decode(errors="replace").strip()
                raise ImageError(f"Go cannot fetch {tool.module} {tool.version}", details=reason,
                                 hint="check the network and GOPROXY")
            partial = target.with_suffix(".partial")
            process.stream(go_build_argv(tool, go, partial), step.detail, env=environment, cwd=Path(answer["Dir"]))
        except process.CommandError as error:
            raise ImageError(f"compiling {tool.name} {tool.version} failed", details=error.details,
                             hint="a newer Go may be needed: https://go.dev/dl/") from error
    return _finish(tool, "go module", partial, target)


def _finish(tool: Tool, source: str, partial: Path, target: Path) -> BuiltTool:
    partial.chmod(0o755)
    partial.rename(target)
    return BuiltTool(tool.name, tool.version, source, target)

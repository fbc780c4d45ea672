"""image list, build, pull, import, rm, prune, warm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qvm.cli import render
from qvm.cli.invocation import Invocation, common_options
from qvm.cli.lazy import AliasGroup
from qvm.cli.options import complete_image, some_setting_options, take_flags
from qvm.cli.output import emit
from qvm.config.settings import BY_KEY

_ALIASES = {"ls": "list", "remove": "rm", "fetch": "pull"}


_name = click.argument("name", metavar="[IMAGE]", required=False, shell_complete=complete_image)
_arch = click.option(
    "-a", "--arch", metavar="ARCH", help="Architecture. [host]",
    shell_complete=lambda ctx, param, incomplete: [
        name for name in ("x86_64", "aarch64") if name.startswith(incomplete)
    ],
)  # fmt: skip
_arch_found = click.option("-a", "--arch", metavar="ARCH", help="Architecture. [found in the image]")


def _default_image() -> str:
    return BY_KEY["image"].default_text


@click.group(cls=AliasGroup, aliases=_ALIASES, no_args_is_help=False, epilog="Example: qvm image list")
def image() -> None:
    """List, build, fetch, import and remove images."""


@image.command("list", epilog="Example: qvm image list --json")
@common_options(name=False)
def list_images(invocation: Invocation, /) -> None:
    """List the catalogue and what is in the cache."""
    from qvm.commands.image import list_images as do_list

    emit(invocation, do_list(), render.render_images)


@image.command(epilog="Example: qvm image build debian-13")
@common_options(name=False)
@_name
@_arch
@click.option("-f", "--force", is_flag=True, help="Build anew even where the cache has it.")
def build(invocation: Invocation, /, *, name: str | None, arch: str | None, force: bool) -> None:
    """Build an image from its recipe."""
    from qvm.commands.image import build as do_build

    with invocation.progress() as progress:
        result = do_build(name or _default_image(), arch, force=force, progress=progress)
    emit(invocation, result, render.render_image, essential=False)


@image.command(epilog="Example: qvm image pull debian-13-cloud")
@common_options(name=False)
@_name
@_arch
def pull(invocation: Invocation, /, *, name: str | None, arch: str | None) -> None:
    """Have an image in the cache, by download or build; IMAGE may be an address with digest, too."""
    from qvm.commands.image import pull as do_pull

    with invocation.progress() as progress:
        result = do_pull(name or _default_image(), arch, progress=progress)
    emit(invocation, result, render.render_image, essential=False)


@image.command("import", epilog="Example: qvm image import my.qcow2 --name mine")
@common_options(name=False)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("-n", "--name", metavar="NAME", help="What to call it. [the file's name without its endings]")
@_arch_found
@click.option("--digest", metavar="DIGEST", help="What the file must have: sha256:... or sha512:...")
@click.option("-f", "--force", is_flag=True, help="Replace an imported image of that name.")
def import_(
    invocation: Invocation, /, *, file: Path, name: str | None, arch: str | None, digest: str | None, force: bool
) -> None:
    """Keep a disk image of your own under a name, for `--image`.

    Takes qcow2 and raw disks, also as .gz, .xz and .zst, that boot by UEFI and are configured by cloud-init.
    """
    from qvm.commands.image import import_image

    with invocation.progress() as progress:
        result = import_image(file, name, arch, digest=digest, force=force, progress=progress)
    emit(invocation, result, render.render_image, essential=False)


@image.command("rm", epilog="Example: qvm image rm debian-13")
@common_options(name=False)
@click.argument("name", metavar="IMAGE", shell_complete=complete_image)
def remove(invocation: Invocation, /, *, name: str) -> None:
    """Remove an image, by name or id, from the cache."""
    from qvm.commands.image import remove as do_remove

    with invocation.progress() as progress:
        result = do_remove(name, progress=progress)
    emit(invocation, result, render.render_removed, essential=False)


@image.command(epilog="Example: qvm image prune")
@common_options(name=False)
def prune(invocation: Invocation, /) -> None:
    """Remove images that nothing needs any more; imported ones stay."""
    from qvm.commands.image import prune as do_prune

    with invocation.progress() as progress:
        result = do_prune(progress=progress)
    emit(invocation, result, render.render_removed, essential=False)


@image.command(epilog="Example: qvm image warm --runtime docker")
@common_options(name=False)
@some_setting_options("image", "arch", "runtime", "accel", "cpus", "memory", "disk",
                      "kubernetes", "kubernetes_version", "k3s_args")
@click.option("--count", type=click.IntRange(1, 20), default=1, metavar="N",
              help="How many to have in stock, of those that serve one VM each (with Kubernetes). [1]")
@click.option("--base", is_flag=True, help="The stage before the runtime starts, for data disks that exist.")
@click.option("-l", "--list", "listing", is_flag=True, help="List the warm images there are.")
@click.option("--rm", "removing", is_flag=True, help="Remove those of the given KEYs; without one, all not in use.")
@click.argument("keys", metavar="[KEY]...", nargs=-1)
def warm(
    invocation: Invocation, /, *, base: bool, count: int, listing: bool, removing: bool, keys: tuple[str, ...],
    **options: Any,
) -> None:
    """Make the warm image that new VMs of these settings start from in a second; list or remove them.

    A start makes what it needs by itself; made ahead, the first start is quick too.
    """
    from qvm.cli.life import working_directory
    from qvm.commands import warm as warming

    flags = take_flags(options)
    if listing and removing:
        raise click.UsageError("--list and --rm exclude each other")
    if keys and not removing:
        raise click.UsageError("keys are named only with --rm")
    if listing:
        emit(invocation, warming.list_all(), render.render_warm_images)
    elif removing:
        emit(invocation, warming.remove(list(keys)), render.render_warm_removed, essential=False)
    else:
        with invocation.progress() as progress:
            made = warming.warm(flags, cwd=working_directory(), base=base, count=count, progress=progress)
        emit(invocation, made, render.render_warm_image, essential=False)

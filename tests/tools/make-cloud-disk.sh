#!/bin/sh
# Makes a cloud-style disk that owes nothing to qvm: Debian by mkosi, with GRUB for UEFI and cloud-init (cloud-disk/).
#
#     tests/tools/make-cloud-disk.sh FOLDER ARCH        ARCH: x86_64 or aarch64
#
# afterwards FOLDER/debian-13-ARCH.raw is a sparse disk and FOLDER/debian-13-ARCH.sha256 its digest. A second run with
# the same configuration does nothing. mkosi comes from Debian 13 into a root of its own, so the host needs only
# mmdebstrap; for another architecture also qemu-user (binfmt), for packages run scripts of their own.
set -eu

fail() {
	echo "make-cloud-disk: $*" >&2
	exit 1
}

[ $# -eq 2 ] || fail "usage: $0 FOLDER ARCH"
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
folder=$(cd "$1" && pwd)
arch=$2
case "$arch" in
x86_64) mkosi_arch=x86-64 ;;
aarch64) mkosi_arch=arm64 ;;
*) fail "no disk for the architecture $arch" ;;
esac

disk="$folder/debian-13-$arch.raw"
wanted=$(cd "$here/cloud-disk" && find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum)
if [ -s "$disk" ] && [ "$(cat "$disk.made" 2>/dev/null)" = "$wanted" ]; then
	exit 0
fi
if [ "$arch" != "$(uname -m)" ] && [ ! -e "/proc/sys/fs/binfmt_misc/qemu-$arch" ]; then
	fail "this host runs no $arch programs (Debian: apt install qemu-user-static binfmt-support)"
fi

mirror=${QVM_DEBIAN_MIRROR:-}
if [ -z "$mirror" ]; then
	# shellcheck disable=SC2016  # apt expands $(REPO_URI), not the shell
	mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep -m 1 -E '/debian/?$') ||
		mirror=http://deb.debian.org/debian
fi

work=$(mktemp -d "$folder/.making.XXXXXX")
trap 'rm -rf "$work"' EXIT
tools="$folder/mkosi"
if [ ! -e "$tools/complete" ]; then
	rm -rf "$tools"
	mkdir "$tools"
	mode=$([ "$(id -u)" = 0 ] && echo root || echo unshare)
	mmdebstrap --quiet --mode="$mode" --variant=apt --dpkgopt='path-exclude=/usr/share/doc/*' \
		--include=mkosi,systemd,systemd-repart,mtools,dosfstools,e2fsprogs,debian-archive-keyring,cpio,zstd,kmod,udev \
		--include=grub-common trixie "$tools/root" "$mirror"
	touch "$tools/complete"
fi

mkdir "$work/out" "$work/work" "$folder/packages-$arch" 2>/dev/null || true
PYTHONPATH="$tools/root/usr/lib/python3/dist-packages" python3 -m mkosi --directory "$here/cloud-disk" \
	--tools-tree "$tools/root" --architecture "$mkosi_arch" --local-mirror "$mirror" --output-directory "$work/out" \
	--workspace-directory "$work/work" --package-cache-dir "$folder/packages-$arch" --force build
mv "$work/out/cloud-disk.raw" "$disk"
sha256sum <"$disk" | cut -d ' ' -f 1 >"$folder/debian-13-$arch.sha256"
echo "$wanted" >"$disk.made"

#!/bin/sh
# A base built in a VM, for a host that has no mmdebstrap: run there as root by qvm/commands/builder.py.
#
#   QVM_OUT  a folder of the host's; holds sources.list and dpkg/, receives what build.sh makes
# and what build.sh reads, but QVM_WORK and QVM_TREE_BYTES, which are decided here.
set -eu

here=$(dirname "$0")
export DEBIAN_FRONTEND=noninteractive

packages=
need() { # program package
	command -v "$1" >/dev/null || packages="$packages $2"
}
need mmdebstrap mmdebstrap
need mke2fs e2fsprogs
need xz xz-utils
need zstd zstd
[ "$QVM_ARCH" = "$QVM_HOST_ARCH" ] || need depmod kmod
[ "$QVM_ARCH" = "$QVM_HOST_ARCH" ] || [ -e "/proc/sys/fs/binfmt_misc/$QVM_BINFMT" ] || packages="$packages qemu-user-binfmt"
if [ -n "$packages" ]; then
	echo "qvm-phase: tools"
	rm -f /etc/apt/sources.list.d/* # the mirror that the host found to answer, and no other
	cp "$QVM_OUT/sources.list" /etc/apt/sources.list
	apt-get -q update
	# shellcheck disable=SC2086 # one word per package
	apt-get -q -y install --no-install-recommends $packages
fi

# The guest's own disk: it knows owners and devices, which a folder of the host's may not.
QVM_WORK=/var/tmp/qvm-build
mkdir "$QVM_WORK"
cp -r "$QVM_OUT/sources.list" "$QVM_OUT/dpkg" "$QVM_WORK"
available=$(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo)
QVM_TREE_BYTES=0
[ "$available" -lt "$((QVM_TREE_ROOM / 1024 + 512 * 1024))" ] || QVM_TREE_BYTES=$QVM_TREE_ROOM
export QVM_WORK QVM_TREE_BYTES
unshare --mount --pid --fork --kill-child -- sh "$here/build.sh"

echo "qvm-phase: copy"
cd "$QVM_WORK"
cp --sparse=always root.raw "$QVM_OUT/root.raw"
cp -r kernel busybox release packages epoch modules python "$QVM_OUT"

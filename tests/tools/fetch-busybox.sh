#!/bin/sh
# Puts Debian's static busybox for other architectures into a folder: what containers of those architectures in tests are
# made of. Nothing is installed, no root needed.
#
#     tests/tools/fetch-busybox.sh FOLDER ARCHITECTURE...        Debian's words: arm64 armhf riscv64 ppc64el s390x amd64
#
# afterwards FOLDER/busybox-ARCHITECTURE is there. It comes from the mirror apt already uses or QVM_DEBIAN_MIRROR; a second
# run does nothing.
set -eu

fail() {
	echo "fetch-busybox: $*" >&2
	exit 1
}

[ $# -ge 2 ] || fail "usage: $0 FOLDER ARCHITECTURE..."
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift

for arch in "$@"; do
	[ ! -e "$folder/busybox-$arch" ] || continue
	"$(dirname "$0")/unpack-debs.sh" "$folder/root-$arch" "$arch" busybox-static
	mv "$folder/root-$arch/usr/bin/busybox" "$folder/busybox-$arch.new" 2>/dev/null ||
		mv "$folder/root-$arch/bin/busybox" "$folder/busybox-$arch.new"
	mv "$folder/busybox-$arch.new" "$folder/busybox-$arch"
	rm -rf "$folder/root-$arch"
done

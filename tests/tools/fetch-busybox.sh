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

mirror=${QVM_DEBIAN_MIRROR:-}
if [ -z "$mirror" ]; then
	# shellcheck disable=SC2016  # apt expands $(REPO_URI), not the shell
	mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 -E '/debian/?$') ||
		fail "apt has no Debian mirror; set QVM_DEBIAN_MIRROR"
fi

for arch in "$@"; do
	[ ! -e "$folder/busybox-$arch" ] || continue
	apt=$(mktemp -d)
	mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$apt/empty"
	: >"$apt/status"
	printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s trixie main\n' "$mirror" >"$apt/sources.list"
	apt_get() {
		apt-get -qq -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts="$apt/empty" \
			-o Dir::State::Lists="$apt/lists" -o Dir::State::Status="$apt/status" -o Dir::Cache="$apt" \
			-o APT::Architecture="$arch" -o APT::Architectures="$arch" -o Debug::NoLocking=true \
			-o APT::Sandbox::User= -o Acquire::Retries=3 -o Acquire::Languages=none \
			-o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false "$@"
	}
	apt_get update
	(cd "$apt" && apt_get download busybox-static)
	dpkg -x "$apt"/busybox-static_*.deb "$apt/root"
	mv "$apt/root/usr/bin/busybox" "$folder/busybox-$arch.new" 2>/dev/null ||
		mv "$apt/root/bin/busybox" "$folder/busybox-$arch.new"
	mv "$folder/busybox-$arch.new" "$folder/busybox-$arch"
	rm -rf "$apt"
done

#!/bin/sh
# Unpacks packages of Debian 13 into a folder: nothing is installed, no root is needed, no dependency comes along.
#
#     tests/tools/unpack-debs.sh FOLDER ARCHITECTURE PACKAGE...        Debian's words: amd64 arm64 armhf ...
#
# They come from the mirror apt already uses or QVM_DEBIAN_MIRROR; apt checks the archive's signature.
set -eu

fail() {
	echo "unpack-debs: $*" >&2
	exit 1
}

[ $# -ge 3 ] || fail "usage: $0 FOLDER ARCHITECTURE PACKAGE..."
mkdir -p "$1"
folder=$(cd "$1" && pwd)
arch=$2
shift 2

command -v apt-get >/dev/null || fail "only Debian and Ubuntu are known here"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e "$keyring" ] || fail "debian-archive-keyring is not installed"
mirror=${QVM_DEBIAN_MIRROR:-}
if [ -z "$mirror" ]; then
	# shellcheck disable=SC2016  # apt expands $(REPO_URI), not the shell
	mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 -E '/debian/?$') ||
		mirror=http://deb.debian.org/debian
fi

apt=$(mktemp -d "$folder/.apt.XXXXXX")
trap 'rm -rf "$apt"' EXIT
mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$apt/empty"
: >"$apt/status"
printf 'deb [signed-by=%s] %s trixie main\n' "$keyring" "$mirror" >"$apt/sources.list"
apt_get() {
	apt-get -qq -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts="$apt/empty" \
		-o Dir::Etc::PreferencesParts="$apt/empty" -o Dir::State="$apt" -o Dir::State::status="$apt/status" \
		-o Dir::State::Lists="$apt/lists" -o Dir::Cache="$apt" -o Dir::Cache::Archives="$apt/archives" \
		-o APT::Architecture="$arch" -o APT::Architectures="$arch" -o Debug::NoLocking=true \
		-o APT::Sandbox::User= -o Acquire::Retries=3 -o Acquire::Languages=none \
		-o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false "$@"
}
apt_get update
for package in "$@"; do
	(cd "$apt" && apt_get download "$package")
	dpkg -x "$apt/$package"_*.deb "$folder"
done

#!/bin/sh
# Puts docker's compose and buildx plugins, and a docker CLI where the host has none, into FOLDER: nothing is
# installed, no engine is started, no root is needed.
#
#     tests/tools/fetch-docker-plugins.sh FOLDER
#
# makes FOLDER/docker-compose, FOLDER/docker-buildx (link them into $DOCKER_CONFIG/cli-plugins) and, where `docker` is
# not on PATH, FOLDER/bin/docker. They come from Debian 13, on the mirror apt already uses or QVM_DEBIAN_MIRROR; apt
# checks the archive's signature. A second run with the same folder does nothing.
set -eu

fail() {
	echo "fetch-docker-plugins: $*" >&2
	exit 1
}

[ $# -eq 1 ] || fail "usage: $0 FOLDER"
mkdir -p "$1"
folder=$(cd "$1" && pwd)

# A plugin answers with a JSON description when the CLI asks who it is.
plugin_works() {
	"$folder/$1" docker-cli-plugin-metadata 2>/dev/null | grep -q SchemaVersion
}

cli_works() {
	command -v docker >/dev/null 2>&1 || "$folder/bin/docker" --version >/dev/null 2>&1
}

packages=
plugin_works docker-compose || packages="$packages docker-compose"
plugin_works docker-buildx || packages="$packages docker-buildx"
cli_works || packages="$packages docker-cli"
[ -n "$packages" ] || exit 0

command -v apt-get >/dev/null || fail "only Debian and Ubuntu are known here; put docker-compose and docker-buildx into $folder"
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
mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$apt/empty" "$apt/root"
: >"$apt/status"
printf 'deb [signed-by=%s] %s trixie main\n' "$keyring" "$mirror" >"$apt/sources.list"
apt_get() {
	apt-get -qq -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts="$apt/empty" \
		-o Dir::Etc::PreferencesParts="$apt/empty" -o Dir::State="$apt" -o Dir::State::status="$apt/status" \
		-o Dir::State::Lists="$apt/lists" -o Dir::Cache="$apt" -o Dir::Cache::Archives="$apt/archives" \
		-o Debug::NoLocking=true -o APT::Sandbox::User= -o Acquire::Retries=3 -o Acquire::Languages=none \
		-o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false "$@"
}
apt_get update
for package in $packages; do
	(cd "$apt" && apt_get download "$package")
	dpkg -x "$apt/$package"_*.deb "$apt/root"
done

for package in $packages; do
	if [ "$package" = docker-cli ]; then
		mkdir -p "$folder/bin"
		mv -f "$apt/root/usr/bin/docker" "$folder/bin/docker"
		cli_works || fail "the unpacked docker does not run: $("$folder/bin/docker" --version 2>&1)"
	else
		mv -f "$apt/root/usr/libexec/docker/cli-plugins/$package" "$folder/$package"
		plugin_works "$package" || fail "the unpacked $package does not run: $("$folder/$package" version 2>&1)"
	fi
done

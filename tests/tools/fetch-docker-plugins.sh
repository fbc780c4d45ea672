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

unpacked=$(mktemp -d "$folder/.unpacked.XXXXXX")
trap 'rm -rf "$unpacked"' EXIT
# shellcheck disable=SC2086  # words
"$(dirname "$0")/unpack-debs.sh" "$unpacked" "$(dpkg --print-architecture)" $packages

for package in $packages; do
	if [ "$package" = docker-cli ]; then
		mkdir -p "$folder/bin"
		mv -f "$unpacked/usr/bin/docker" "$folder/bin/docker"
		cli_works || fail "the unpacked docker does not run: $("$folder/bin/docker" --version 2>&1)"
	else
		mv -f "$unpacked/usr/libexec/docker/cli-plugins/$package" "$folder/$package"
		plugin_works "$package" || fail "the unpacked $package does not run: $("$folder/$package" version 2>&1)"
	fi
done

#!/bin/sh
# Makes TARGET: a tar of a small Debian root with nginx that serves on port 80. Does nothing where it exists.
# usage: make-nginx-tar.sh TARGET
set -eu
target=$1
[ -s "$target" ] && exit 0
mkdir -p "$(dirname "$target")"
mirror=${QVM_DEBIAN_MIRROR:-}
if [ -z "$mirror" ]; then
    # shellcheck disable=SC2016  # $(REPO_URI) is a placeholder of apt's, not the shell's
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 /debian/ || true)
fi
temporary=$(mktemp "$target.XXXXXX")
trap 'rm -f "$temporary"' EXIT
mode=$([ "$(id -u)" = 0 ] && echo root || echo unshare)
mmdebstrap --mode="$mode" --variant=essential --include=nginx-light --format=tar \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' trixie - "${mirror:?no Debian mirror in the sources of apt}" > "$temporary"
mv "$temporary" "$target"

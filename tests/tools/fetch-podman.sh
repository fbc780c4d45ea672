#!/bin/sh
# Puts podman's client into FOLDER, as Debian 13 has it: nothing is installed, no root is needed.
#
#     tests/tools/fetch-podman.sh FOLDER
#
# afterwards FOLDER/podman is there, which can do what `podman --remote` can. It runs with the C library it was made for,
# which comes along, so that any host will do. All comes from the mirror apt already uses or QVM_DEBIAN_MIRROR; apt checks
# the archive's signature. A second run with the same folder does nothing.
set -eu

fail() {
	echo "fetch-podman: $*" >&2
	exit 1
}

[ $# -eq 1 ] || fail "usage: $0 FOLDER"
mkdir -p "$1"
folder=$(cd "$1" && pwd)

works() {
	"$folder/podman" --version >/dev/null 2>&1
}

if works; then
	exit 0
fi

unpacked=$(mktemp -d "$folder/.unpacked.XXXXXX")
trap 'rm -rf "$unpacked"' EXIT
"$(dirname "$0")/unpack-debs.sh" "$unpacked" "$(dpkg --print-architecture)" podman-remote libc6 libsqlite3-0
rm -rf "$folder/root"
chmod 755 "$unpacked"
mv "$unpacked" "$folder/root"
loader=$(find "$folder/root/usr/lib" -name 'ld-linux*.so*' -type f | head -n 1)
libraries=$(dirname "$(find "$folder/root/usr/lib" -name 'libsqlite3.so.0' | head -n 1)")
cat >"$folder/podman.new" <<WRAPPER
#!/bin/sh
exec '$loader' --library-path '$libraries' '$folder/root/usr/bin/podman-remote' "\$@"
WRAPPER
chmod 755 "$folder/podman.new"
mv "$folder/podman.new" "$folder/podman"
works || fail "the unpacked podman does not run: $("$folder/podman" --version 2>&1)"

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

command -v apt-get >/dev/null || fail "only Debian and Ubuntu are known here; put podman's client at $folder/podman"
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
for package in podman-remote libc6 libsqlite3-0; do
	(cd "$apt" && apt_get download "$package")
	dpkg -x "$apt/$package"_*.deb "$apt/root"
done
rm -rf "$folder/root"
mv "$apt/root" "$folder/root"
loader=$(find "$folder/root/usr/lib" -name 'ld-linux*.so*' -type f | head -n 1)
libraries=$(dirname "$(find "$folder/root/usr/lib" -name 'libsqlite3.so.0' | head -n 1)")
cat >"$folder/podman.new" <<WRAPPER
#!/bin/sh
exec '$loader' --library-path '$libraries' '$folder/root/usr/bin/podman-remote' "\$@"
WRAPPER
chmod 755 "$folder/podman.new"
mv "$folder/podman.new" "$folder/podman"
works || fail "the unpacked podman does not run: $("$folder/podman" --version 2>&1)"

#!/bin/sh
# Puts a QEMU 10 beside the one this host has, for the tests that run on both: nothing is installed, no root needed.
#
#     tests/tools/fetch-qemu10.sh FOLDER
#
# afterwards the emulators of every architecture are in FOLDER/bin (QVM_QEMU=FOLDER/bin). On Debian 12 they come from its
# backports, on the mirror apt already uses or QVM_DEBIAN_MIRROR; a host whose own QEMU is 10 or newer is used as it is.
# A second run with the same folder does nothing.
set -eu

fail() {
	echo "fetch-qemu10: $*" >&2
	exit 1
}

[ $# -eq 1 ] || fail "usage: $0 FOLDER"
mkdir -p "$1"
folder=$(cd "$1" && pwd)
emulators="qemu-system-x86_64 qemu-system-aarch64 qemu-system-arm qemu-system-riscv64 qemu-system-ppc64 qemu-system-s390x"

works() {
	for name in $emulators; do
		"$folder/bin/$name" --version >/dev/null 2>&1 || return 1
	done
}

if works; then
	exit 0
fi
mkdir -p "$folder/bin"

# The host's own, when it is new enough.
own=$(qemu-system-x86_64 --version 2>/dev/null | sed -n 's/^QEMU emulator version \([0-9]*\).*/\1/p')
if [ "${own:-0}" -ge 10 ]; then
	for name in $emulators; do
		path=$(command -v "$name") || fail "$name is not installed (Debian: apt install qemu-system)"
		ln -sf "$path" "$folder/bin/$name"
	done
	exit 0
fi

codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
[ "$codename" = bookworm ] || fail "only Debian 12 has backports with QEMU 10 (this is '${codename:-unknown}')"

mirror=${QVM_DEBIAN_MIRROR:-}
if [ -z "$mirror" ]; then
	# shellcheck disable=SC2016  # apt expands $(REPO_URI), not the shell
	mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 -E '/debian/?$') ||
		fail "apt has no Debian mirror; set QVM_DEBIAN_MIRROR"
fi

apt="$folder/apt"
mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$apt/empty"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
printf 'deb [signed-by=%s] %s %s main\n' \
	"$keyring" "$mirror" bookworm "$keyring" "$mirror" bookworm-backports >"$apt/sources.list"
# The host's own package state stays the one to build on (only what it lacks is fetched) and is never written.
apt_get() {
	apt-get -qq -o Dir::Etc::SourceList="$apt/sources.list" -o Dir::Etc::SourceParts="$apt/empty" \
		-o Dir::State::Lists="$apt/lists" -o Dir::Cache="$apt" -o Dir::Cache::Archives="$apt/archives" \
		-o Debug::NoLocking=true -o APT::Sandbox::User= -o Acquire::Retries=3 -o Acquire::Languages=none \
		-o Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false "$@"
}
apt_get update
apt_get install --yes --download-only --no-install-recommends --target-release bookworm-backports \
	qemu-system-x86 qemu-system-arm qemu-system-riscv qemu-system-ppc qemu-system-s390x qemu-system-common \
	qemu-system-data opensbi qemu-slof

rm -rf "$folder/root"
mkdir "$folder/root"
for package in "$apt"/archives/*.deb; do
	dpkg -x "$package" "$folder/root"
done
# Wrappers rather than links: the libraries the host lacks lie in the unpacked tree, and QEMU must not load the modules
# of the host's own QEMU (it aborts on those of another build). It finds its data relative to its own place.
libraries="$folder/root/usr/lib/$(uname -m)-linux-gnu"
for name in $emulators; do
	cat >"$folder/bin/$name.new" <<WRAPPER
#!/bin/sh
export LD_LIBRARY_PATH='$libraries' QEMU_MODULE_DIR='$libraries/qemu'
exec '$folder/root/usr/bin/$name' "\$@"
WRAPPER
	chmod 755 "$folder/bin/$name.new"
	mv "$folder/bin/$name.new" "$folder/bin/$name"
done
works || fail "the unpacked QEMU does not run: $("$folder/bin/qemu-system-x86_64" --version 2>&1)"
rm -rf "$apt"

#!/usr/bin/env bash
# Makes a checkout ready to run: installs the programs that are missing, then a venv in .venv with qvm in it.
#
#     scripts/bootstrap.sh          what `qvm start` needs
#     scripts/bootstrap.sh --test   also what `make test` needs
#
# Asks before it installs anything, except with CI=true or where there is no terminal. Where nothing is missing it
# neither calls a package manager nor uses the network. Exit code 4: the host lacks something this cannot mend.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"

say() {
	echo "bootstrap: $*" >&2
}

fail() {
	say "$*"
	exit 4
}

mode="run"
case "${1:-}" in
"") ;;
--test) mode="test" ;;
*)
	echo "usage: $0 [--test]" >&2
	exit 2
	;;
esac

# --- what is missing -------------------------------------------------------------------------------------------------

missing=()
reasons=()

# Notes a package as missing unless the test given after its reason holds.
need() { # package reason test...
	local package=$1 reason=$2
	shift 2
	if ! "$@" >/dev/null 2>&1; then
		missing+=("$package")
		reasons+=("$reason")
	fi
}

has() {
	command -v "$1"
}

is_static() {
	[ -x "$1" ] && ! ldd "$1"
}

# Debian 13 has it in qemu-user, under the other name.
has_user_emulator() {
	has qemu-aarch64-static || has qemu-aarch64
}

find_python() {
	local name
	for name in python3 python3.14 python3.13 python3.12 python3.11; do
		if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
			command -v "$name"
			return 0
		fi
	done
	return 1
}

can_make_venv() {
	local python
	python=$(find_python) && "$python" -c 'import ensurepip, venv'
}

list_debian() {
	case "$(uname -m)" in
	x86_64) need qemu-system-x86 "runs the VMs" has qemu-system-x86_64 ;;
	aarch64 | arm64) need qemu-system-arm "runs the VMs" has qemu-system-aarch64 ;;
	*) fail "there is no VM for this host's architecture $(uname -m) yet; x86_64 and aarch64 are supported" ;;
	esac
	need qemu-utils "makes and grows disks" has qemu-img
	need mmdebstrap "builds the VM's image from the Debian mirror" has mmdebstrap
	need debian-archive-keyring "checks the mirror's signatures" test -e /usr/share/keyrings/debian-archive-keyring.gpg
	need e2fsprogs "makes the image's file system" has mke2fs
	need uidmap "builds images without root" has newuidmap
	need openssh-client "qvm ssh" has ssh
	need xz-utils "unpacks kernel modules" has xz
	need zstd "packs the initramfs" has zstd
	need ca-certificates "checks downloads" test -e /etc/ssl/certs/ca-certificates.crt
	find_python >/dev/null || ! has python3 >/dev/null ||
		fail "qvm needs Python 3.11 or newer; this host has $(python3 --version 2>&1)"
	need python3-venv "keeps qvm's Python packages apart" can_make_venv
	if [ "$mode" = test ]; then
		need shellcheck "lints the shell scripts" has shellcheck
		# The host's own is needed anyway; the other one runs the tests' VMs of another architecture. What there is of
		# rarer ones (qemu-system-misc, -ppc ...) is asked whether it takes our command lines.
		if [ "$(uname -m)" = x86_64 ]; then
			need qemu-system-arm "runs the tests' aarch64 VMs" has qemu-system-aarch64
		else
			need qemu-system-x86 "runs the tests' x86_64 VMs" has qemu-system-x86_64
		fi
		need qemu-user-static "builds the tests' aarch64 images" has_user_emulator
		need binfmt-support "builds the tests' aarch64 images" has update-binfmts
		need kmod "indexes kernel modules of other architectures" has depmod
		need busybox-static "is the tests' container image" is_static /bin/busybox
		need docker-registry "is the tests' registry" test -x /usr/bin/docker-registry
	fi
}

list_macos() {
	need qemu "runs the VMs" has qemu-img
	need e2fsprogs "makes file systems" test -x "$(brew --prefix 2>/dev/null)/opt/e2fsprogs/sbin/mke2fs"
	need python@3.13 "runs qvm" can_make_venv
	if [ "$mode" = test ]; then
		need shellcheck "lints the shell scripts" has shellcheck
	fi
}

# --- installing ------------------------------------------------------------------------------------------------------

as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif has sudo >/dev/null; then
		sudo "$@"
	else
		fail "sudo is not installed; run as root: apt-get install ${missing[*]}"
	fi
}

install_debian() {
	local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120)
	as_root "${apt[@]}" update >&2 || say "the package lists could not be refreshed; trying with those there are"
	as_root "${apt[@]}" install --no-install-recommends "${missing[@]}" >&2 ||
		fail "apt-get could not install: ${missing[*]}"
}

install_macos() {
	has brew >/dev/null || fail "Homebrew is not installed: https://brew.sh"
	brew install "${missing[@]}" >&2
}

ask() {
	local answer index
	say "missing on this host:"
	for index in "${!missing[@]}"; do
		printf '    %-24s %s\n' "${missing[$index]}" "${reasons[$index]}" >&2
	done
	if [ "${CI:-}" = true ] || [ ! -t 0 ]; then
		return 0
	fi
	read -r -p "Install them now? [Y/n] " answer
	case "$answer" in
	"" | [Yy]*) ;;
	*) fail "nothing was installed" ;;
	esac
}

if has apt-get >/dev/null; then
	system=debian
elif [ "$(uname -s)" = Darwin ]; then
	system=macos
else
	system=other
fi

case "$system" in
debian) list_debian ;;
macos) list_macos ;;
*) list_debian ;; # the names are Debian's; what is missing is told, installing is up to the user
esac

if [ "${#missing[@]}" -gt 0 ]; then
	ask
	case "$system" in
	debian) install_debian ;;
	macos) install_macos ;;
	*) fail "install these (Debian's names) with your package manager, then try again" ;;
	esac
fi

# Containers come without the file system that tells the kernel about foreign programs.
if [ "$mode" = test ] && [ "$system" = debian ] && [ "$(id -u)" = 0 ] && [ ! -e /proc/sys/fs/binfmt_misc/register ]; then
	if ! { mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc && update-binfmts --enable; }; then
		say "images of other architectures cannot be built here: binfmt_misc cannot be mounted"
	fi
fi

# --- the venv --------------------------------------------------------------------------------------------------------

python=$(find_python) || fail "qvm needs Python 3.11 or newer"
extras=
[ "$mode" = run ] || extras="[test]"

# What the venv was made for: its interpreter, the declared dependencies, this folder.
wanted=$("$python" --version; cksum <pyproject.toml; pwd -P)
stamp=.venv/.qvm-"$mode"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
	# A venv with the test tools serves `run` too.
	if [ "$mode" = run ] && [ "$(cat .venv/.qvm-test 2>/dev/null)" = "$wanted" ]; then
		exit 0
	fi
	say "installing qvm's Python packages into .venv"
	if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
		rm -rf .venv
		"$python" -m venv .venv
	fi
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$extras"
	printf '%s\n' "$wanted" >"$stamp"
fi

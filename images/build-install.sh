#!/bin/sh
# Hooks of mmdebstrap, called by build.sh: build-install.sh lists|install ROOT
#
# Nothing here needs the image's CPU but dpkg's configuring, in a chroot: the host's apt, dpkg and tar unpack. For a
# foreign CPU the host lends the chroot its shell, Perl and small tools, which do most of what maintainer scripts do.
set -eu

root=$2
here=$(dirname "$0")
cache="$root/var/cache/apt/archives"
# What packages would run over and over, each for itself; at the end it is done once for all.
deferred="depmod ldconfig py3compile py3clean update-ca-certificates"
# What makes nothing that is kept: host keys come from the seed, and QEMU's devices need no hardware database.
pointless="ssh-keygen systemd-hwdb"
lent="dash bash perl sed grep mawk find xargs cmp diff update-alternatives
	basename cat chgrp chmod chown comm cp cut date dirname echo env expr false head id install join ln ls md5sum mkdir mkfifo
	mktemp mv od paste printf pwd readlink realpath rm rmdir seq sha256sum sleep sort stat sync tac tail tee test touch tr
	true truncate uniq wc whoami"

is_foreign() { [ "$QVM_ARCH" != "$QVM_HOST_ARCH" ]; }

fetch() { # file, what apt-get installs: fetches the packages and writes their paths into that file
	list=$1
	shift
	apt-get --yes -oDebug::pkgDPkgPm=1 -oDir::Log=/dev/null -oDebug::NoLocking=1 -oDPkg::Use-Pty=0 \
		"-oDPkg::Pre-Install-Pkgs::=cat >'$list'" install "$@"
}

unpack_plainly() { # tree, list: without dpkg, and without what is left out anyway
	while read -r package; do
		dpkg-deb --fsys-tarfile "$package" | tar -C "$1" --keep-directory-symlink -X "$QVM_WORK/excluded" -xf -
	done <"$2"
}

unpack() { # list
	xargs -a "$1" dpkg --root="$root" --force-architecture --force-depends --no-debsig --log=/dev/null --unpack
}

# Each lent program lies over the image's own, for as long as scripts run. Its libraries have a folder of their own there.
lend() {
	mkdir "$QVM_WORK/lent"
	: >"$QVM_WORK/lent.files"
	[ -e "$root/lib64" ] || {
		ln -s usr/lib64 "$root/lib64"
		echo "$root/lib64" >>"$QVM_WORK/lent.files"
	}
	for name in $lent; do
		program=$(readlink -f "$(command -v "$name")") || continue
		over="$root/usr/bin/$name"
		if [ ! -f "$over" ] || [ -L "$over" ] || ! ldd "$program" >"$QVM_WORK/lent.ldd" 2>/dev/null; then
			continue
		fi
		cp "$program" "$QVM_WORK/lent/$name"
		grep -o '/[^ ]*' "$QVM_WORK/lent.ldd" | while read -r library; do
			lend_file "$library"
		done
		mount --bind "$QVM_WORK/lent/$name" "$over"
	done
	perl -e 'print "$_\n" for grep { m{/perl-base$} } @INC' | while read -r modules; do
		lend_file "$modules"
	done
}

lend_file() {
	there="$root/usr/${1#/usr/}"
	[ ! -e "$there" ] || return 0
	mkdir -p "${there%/*}"
	cp -rL "$1" "$there"
	echo "$there" >>"$QVM_WORK/lent.files"
}

take_back() {
	for name in $lent; do
		! mountpoint -q "$root/usr/bin/$name" || umount "$root/usr/bin/$name"
	done
	while read -r path; do
		rm -rf "$path"
		rmdir -p --ignore-fail-on-non-empty "${path%/*}" 2>/dev/null || true
	done <"$QVM_WORK/lent.files"
}

# The image's own dpkg, so that its native architecture is the right one.
configure() {
	chroot "$root" dpkg --configure --pending --log=/dev/null
}

# What scripts look for in a system: devices, /proc, and a policy that starts nothing.
furnish() {
	for device in null zero full random urandom tty; do
		rm -f "$root/dev/$device"
		: >"$root/dev/$device"
		mount --bind "/dev/$device" "$root/dev/$device"
	done
	mount -t proc proc "$root/proc"
	printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
	mkdir -p "$root/usr/local/sbin"
	for name in $deferred $pointless; do
		printf '#!/bin/sh\nexit 0\n' >"$root/usr/local/sbin/$name"
		chmod 755 "$root/usr/local/sbin/$name"
	done
	chmod 755 "$root/usr/sbin/policy-rc.d"
}

clear_out() {
	for device in null zero full random urandom tty; do
		umount "$root/dev/$device"
	done
	umount "$root/proc"
	rm "$root/usr/sbin/policy-rc.d"
	for name in $deferred $pointless; do
		rm "$root/usr/local/sbin/$name"
	done
}

# A Python that runs here, outside the image, of the very version that will import what it compiles. `compile_all` uses
# it, and later builds that put a new agent into this base.
make_python() { # tree that has it
	python=$(readlink -f "$1/usr/bin/python3" || true)
	[ -x "$python" ] || python=$(find "$1/usr/bin" -name 'python3.*[0-9]' | sort | head -n 1)
	version=$(basename "$python")
	loader=$(find "$1/usr/lib" "$1/usr/lib64" -maxdepth 2 -name 'ld*.so.[0-9]' -type f 2>/dev/null | sort | head -n 1)
	libraries=$(find "$1/usr/lib" -maxdepth 2 -name 'libc.so.6')
	mkdir -p "$QVM_WORK/python/lib" "$QVM_WORK/python/home/lib/$version"
	cp "$python" "$QVM_WORK/python/python"
	cp "$loader" "$QVM_WORK/python/lib"
	"$loader" --library-path "${libraries%/*}" --list "$python" | grep -o '=> /[^ ]*' | while read -r _ library; do
		[ -e "$QVM_WORK/python/lib/${library##*/}" ] || cp -L "$library" "$QVM_WORK/python/lib"
	done
	cp -r "$1/usr/lib/$version/encodings" "$QVM_WORK/python/home/lib/$version/"
	rm -rf "$QVM_WORK/python/home/lib/$version/encodings/__pycache__"
}

# Always the same modules in one process: what one compiles is marked in memory, and the marks are written.
compile_all() {
	loader=$(echo "$QVM_WORK"/python/lib/ld*.so.[0-9])
	for part in 0 1 2 3; do
		(cd "$root" && find usr/lib/python3* usr/share/python3 -name '*.py' | sort | sed -n "$((part + 1))~4p") |
			PYTHONHOME="$QVM_WORK/python/home" "$loader" --library-path "$QVM_WORK/python/lib" "$QVM_WORK/python/python" \
				-S -s "$here/compile.py" --tree "$root" &
		pids="${pids-} $!"
	done
	for pid in $pids; do
		wait "$pid"
	done
}

# apt's marks: what the recipe does not name is there only because something needs it.
mark_automatic() {
	{
		printf '%s\n' "$QVM_INCLUDE" apt | tr , '\n'
		sed 's|.*/||; s|_.*||' "$QVM_WORK/essential"
	} >"$QVM_WORK/manual"
	dpkg-query --admindir="$root/var/lib/dpkg" -W -f='${Package} ${Architecture}\n' | sort |
		awk -v native="$QVM_ARCH" 'NR == FNR { asked[$1] = 1; next }
			!($1 in asked) { printf "Package: %s\nArchitecture: %s\nAuto-Installed: 1\n\n", $1, $2 == "all" ? native : $2 }' \
			"$QVM_WORK/manual" - >"$root/var/lib/apt/extended_states"
}

case "$1" in
lists)
	mkdir -p "$cache" "$root/var/lib/apt/lists" "$QVM_PACKAGES/lists"
	mount --bind "$QVM_PACKAGES" "$cache"
	# apt asks the mirror only whether they are still the newest.
	find "$QVM_PACKAGES/lists" -maxdepth 1 -type f -exec cp -t "$root/var/lib/apt/lists" {} +
	exit 0
	;;
esac

export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
find "$QVM_PACKAGES/lists" -maxdepth 1 -type f -delete
find "$root/var/lib/apt/lists" -maxdepth 1 -type f ! -name lock -exec cp -t "$QVM_PACKAGES/lists" {} +

essential="?and(?essential,?architecture($QVM_ARCH))"
fetch "$QVM_WORK/essential" "$essential"
# shellcheck disable=SC2046 # one word per package
fetch "$QVM_WORK/all" "$essential" apt $(echo "$QVM_INCLUDE" | tr , ' ')
grep -vxFf "$QVM_WORK/essential" "$QVM_WORK/all" >"$QVM_WORK/rest"
if is_foreign; then
	minimal=$(grep -o 'python3\.[0-9]*-minimal' "$QVM_WORK/all" | head -n 1)
	fetch "$QVM_WORK/python.all" "$minimal:$QVM_HOST_ARCH"
	# apt keeps the image's own libraries of the same names at the same version beside them.
	grep -E "_($QVM_HOST_ARCH|all)\.deb\$" "$QVM_WORK/python.all" >"$QVM_WORK/python.packages"
fi
# Only what this build used stays, so that the cache does not grow from release to release.
touch "$QVM_WORK/python.packages"
cat "$QVM_WORK/all" "$QVM_WORK/python.packages" | sed 's|.*/||' | sort -u >"$QVM_WORK/used"
find "$QVM_PACKAGES" -maxdepth 1 -name '*.deb' -printf '%f\n' | sort | comm -23 - "$QVM_WORK/used" |
	(cd "$QVM_PACKAGES" && xargs -r rm -f --)
# The moment of a build is that of its youngest package: each begins with "!<arch>", then a name and a time.
xargs -a "$QVM_WORK/all" head -qc 36 | tr '!' '\n' | sed -n 's/^debian-binary *\([0-9]*\).*/\1/p' | sort -n | tail -n 1 >"$QVM_WORK/epoch"
SOURCE_DATE_EPOCH=$(cat "$QVM_WORK/epoch")
export SOURCE_DATE_EPOCH
echo "qvm-packages: $(wc -l <"$QVM_WORK/all")"

# What dpkg will leave out; the little that it keeps of that it puts there itself.
sed -n 's|^path-exclude=/|./|p' /etc/dpkg/dpkg.cfg >"$QVM_WORK/excluded"
unpack_plainly "$root" "$QVM_WORK/essential"
unpack "$QVM_WORK/essential"
furnish
if is_foreign; then lend; fi
configure
unpack "$QVM_WORK/rest"
# Replaced for the moment, since it is called by its path.
: >"$QVM_WORK/nothing"
for script in "$root"/usr/lib/python3.*/py_compile.py; do
	mount --bind "$QVM_WORK/nothing" "$script"
done
configure
umount "$root"/usr/lib/python3.*/py_compile.py
chroot "$root" /usr/sbin/ldconfig
chroot "$root" /usr/sbin/update-ca-certificates
if is_foreign; then
	take_back
	mkdir "$QVM_WORK/python-root"
	unpack_plainly "$QVM_WORK/python-root" "$QVM_WORK/python.packages"
	make_python "$QVM_WORK/python-root"
else
	make_python "$root"
fi
clear_out
umount "$cache"
echo "qvm-phase: compile"
compile_all
mark_automatic

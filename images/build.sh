#!/bin/sh
# The part of an image's build that needs to be root, or root of a user namespace: Debian's packages into a folder,
# the folder into an ext4 image. Run by qvm/image/rootfs.py, which sets every QVM_* variable used here.
#
#   QVM_WORK      folder of this build; receives root.raw, kernel, busybox, modules/, python/, packages, epoch
#   QVM_PACKAGES  cache of .deb files and of apt's lists
#   QVM_TREE_BYTES  size of a tmpfs for the unpacked root; 0: it lies in QVM_WORK
#   QVM_SUITE QVM_ARCH QVM_HOST_ARCH QVM_INCLUDE QVM_ROOT_BYTES QVM_PLAIN_MODULES QVM_LABEL
#
# mmdebstrap sets the root up and reads the mirror; build-install.sh, its hook, installs; what follows here makes the
# same content of the same packages, whoever builds them, when and where.
set -eu

here=$(dirname "$0")
root="$QVM_WORK/root"
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive DEBCONF_NONINTERACTIVE_SEEN=true
# The kernel's package would build an initramfs with the whole of initramfs-tools; qvm makes its own.
export INITRD=No
# Perl and Python order their tables by chance otherwise.
export PERL_HASH_SEED=0 PYTHONHASHSEED=0
# Not the caller's: it decides about modes in the image.
umask 022

phase() { echo "qvm-phase: $*"; }

# Whoever started this reads our output. When they are gone, killed perhaps, nobody wants the rest either: everything in
# this pid namespace but its first process ends, and that one by the failure of what it waits for.
(
	trap '' PIPE
	while sleep 2; do
		echo qvm-alive 2>/dev/null || kill -KILL -1
	done
) &

mkdir "$root"
# In memory unpacking costs a third less. The mount is this namespace's own and goes with it.
if [ "$QVM_TREE_BYTES" -gt 0 ]; then
	mount -t tmpfs -o "size=$QVM_TREE_BYTES,mode=0755" qvm-root "$root"
fi
# The host's own settings of dpkg are not the image's.
mount --bind "$QVM_WORK/dpkg" /etc/dpkg

# The host's packages too where they are foreign: a Python of the image's version that runs here compiles its modules.
architectures="$QVM_ARCH"
[ "$QVM_ARCH" = "$QVM_HOST_ARCH" ] || architectures="$QVM_ARCH,$QVM_HOST_ARCH"

mmdebstrap --mode=root --variant=custom --format=directory --architectures="$architectures" --verbose \
	--skip=check/qemu,chroot/mount,chroot/policy-rc.d,chroot/start-stop-daemon,cleanup/apt --setup-hook="sh '$here/build-install.sh' lists \"\$1\"" \
	--customize-hook="sh '$here/build-install.sh' install \"\$1\"" \
	--aptopt='Acquire::Languages "none"' --aptopt='APT::Install-Recommends "false"' \
	--aptopt='Acquire::Retries "3"' --aptopt='APT::Sandbox::User "root"' \
	"$QVM_SUITE" "$root" "$QVM_WORK/sources.list"

phase finish
SOURCE_DATE_EPOCH=$(cat "$QVM_WORK/epoch")
export SOURCE_DATE_EPOCH
release=$(basename "$(echo "$root"/usr/lib/modules/*)")
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/cache/debconf/*-old "$root"/var/cache/ldconfig \
	"$root"/var/log/* "$root"/etc/ssh/ssh_host_* "$root"/boot/initrd* "$root"/initrd* "$root"/vmlinuz* \
	"$root"/etc/dpkg/dpkg.cfg.d/99mmdebstrap "$root"/etc/apt/apt.conf.d/*mmdebstrap "$root"/etc/hostname \
	"$root"/etc/.pwd.lock "$root"/etc/*- "$root"/var/lib/dpkg/*-old "$root"/var/lib/dpkg/arch \
	"$root"/var/lib/dpkg/lock* "$root"/var/lib/systemd/random-seed "$root"/var/lib/dbus/machine-id \
	"${root:?}"/dev/* "$root"/run/* "$root"/tmp/* "$root"/var/tmp/*
: >"$root/etc/machine-id"
# The day of the last change of a password is the day of the build.
sed -i -E "s/^([^:]*:[^:]*):[0-9]+:/\1:$((SOURCE_DATE_EPOCH / 86400)):/" "$root/etc/shadow"

dpkg-query --admindir="$root/var/lib/dpkg" -W -f='${Package}\t${Version}\n' | sort >"$QVM_WORK/packages"

# Modules that nearly every boot loads are stored plain: unpacking xz under software emulation costs more than they do.
for module in $QVM_PLAIN_MODULES; do
	find "$root/usr/lib/modules/$release" -name "$module.ko.xz" -exec xz -d {} +
done
if [ "$QVM_ARCH" != "$QVM_HOST_ARCH" ] && command -v depmod >/dev/null; then
	depmod -b "$root" "$release"
else
	chroot "$root" depmod "$release"
fi

# What the first stage and the baking of later files read.
cp "$root/usr/bin/busybox" "$QVM_WORK/busybox"
mkdir -p "$QVM_WORK/modules"
cp -r "$root/usr/lib/modules/$release/." "$QVM_WORK/modules"
echo "$release" >"$QVM_WORK/release"

# QEMU enters an uncompressed x86 kernel by its PVH note and so skips unpacking, which under emulation takes 0.7 s.
image=$(find "$root/boot" -name "vmlinu[xz]-$release")
cp "$image" "$QVM_WORK/kernel"
if [ "$QVM_ARCH" = amd64 ]; then
	offset=$(LC_ALL=C grep -obUaP '\x28\xb5\x2f\xfd' "$image" | head -n 1 | cut -d : -f 1)
	# What follows the payload is no part of it, so zstd complains at the end, after having written everything.
	tail -c "+$((offset + 1))" "$image" | zstd -qdc >"$QVM_WORK/vmlinux" 2>/dev/null || true
	if [ "$(head -c 4 "$QVM_WORK/vmlinux" | od -An -c | tr -d ' ')" = '177ELF' ]; then
		mv "$QVM_WORK/vmlinux" "$QVM_WORK/kernel"
	else
		rm "$QVM_WORK/vmlinux"
	fi
fi

# Nothing is younger than the youngest package.
find "$root" -xdev -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

phase disk
sh "$here/build-disk.sh" "$root" "$QVM_WORK/root.raw" "$QVM_ROOT_BYTES" "$QVM_LABEL"
if [ "$QVM_TREE_BYTES" -gt 0 ]; then
	umount --lazy "$root"
	rmdir "$root"
else
	rm -rf "$root"
fi

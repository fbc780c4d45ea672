#!/bin/sh
# The part of an image's build that needs to be root, or root of a user namespace: Debian's packages into a folder,
# the folder into an ext4 image. Run by qvm/image/rootfs.py, which sets every QVM_* variable used here.
#
#   QVM_WORK      folder of this build; receives root.raw, kernel, busybox, modules/, python/, packages
#   QVM_PACKAGES  cache of .deb files
#   QVM_SUITE QVM_ARCH QVM_INCLUDE QVM_ROOT_BYTES QVM_PLAIN_MODULES
set -eu

root="$QVM_WORK/root"
cache="$root/var/cache/apt/archives"

phase() { echo "qvm-phase: $*"; }

# Hooks of mmdebstrap call this script again with their name and the root folder.
case "${1-}" in
setup)
	# Links where the cache is on the same file system: nothing is copied.
	mkdir -p "$2/var/cache/apt/archives"
	find "$QVM_PACKAGES" -maxdepth 1 -name '*.deb' -exec cp -lt "$2/var/cache/apt/archives" {} + 2>/dev/null ||
		find "$QVM_PACKAGES" -maxdepth 1 -name '*.deb' -exec cp -t "$2/var/cache/apt/archives" {} +
	exit 0
	;;
keep)
	# Only what this build used stays, so that the cache does not grow from release to release.
	find "$QVM_PACKAGES" -maxdepth 1 -name '*.deb' -delete
	cp -lt "$QVM_PACKAGES" "$2"/var/cache/apt/archives/*.deb 2>/dev/null ||
		cp -t "$QVM_PACKAGES" "$2"/var/cache/apt/archives/*.deb
	exit 0
	;;
esac

# Whoever started this reads our output. When they are gone, killed perhaps, nobody wants the rest either: everything in
# this pid namespace but its first process ends, and that one by the failure of what it waits for.
(
	trap '' PIPE
	while sleep 2; do
		echo qvm-alive 2>/dev/null || kill -KILL -1
	done
) &

mkdir "$root"
export DEBIAN_FRONTEND=noninteractive
# The kernel's package would build an initramfs with the whole of initramfs-tools; qvm makes its own.
export INITRD=No

set -- --mode=root --variant=apt --format=directory --architectures="$QVM_ARCH" --include="$QVM_INCLUDE" \
	--verbose --skip=cleanup/apt,essential/unlink \
	--setup-hook="sh '$0' setup \"\$1\"" --customize-hook="sh '$0' keep \"\$1\"" \
	--aptopt='Acquire::Languages "none"' --aptopt='APT::Install-Recommends "false"' \
	--aptopt='Acquire::Retries "3"' --dpkgopt="$QVM_WORK/dpkg.cfg" \
	"$QVM_SUITE" "$root" "$QVM_WORK/sources.list"
mmdebstrap "$@"

phase finish
release=$(basename "$(echo "$root"/usr/lib/modules/*)")
rm -rf "$root"/var/lib/apt/lists/* "${cache:?}"/* "$root"/var/cache/apt/*.bin "$root"/var/cache/debconf/*-old \
	"$root"/var/log/* "$root"/etc/ssh/ssh_host_* "$root"/boot/initrd* "$root"/initrd* "$root"/vmlinuz* \
	"$root"/etc/dpkg/dpkg.cfg.d/99mmdebstrap "$root"/etc/apt/apt.conf.d/99mmdebstrap "$root"/etc/hostname \
	"$root"/etc/.pwd.lock "$root"/var/lib/dpkg/*-old "$root"/var/lib/systemd/random-seed

: >"$root/etc/machine-id"
# An index of what is there costs nothing to keep and is asked for by people.
chroot "$root" dpkg-query -W >"$QVM_WORK/packages"

# Modules that nearly every boot loads are stored plain: unpacking xz under software emulation costs more than they do.
for module in $QVM_PLAIN_MODULES; do
	find "$root/usr/lib/modules/$release" -name "$module.ko.xz" -exec xz -d {} +
done
chroot "$root" depmod "$release"

# What the first stage and the baking of later files read.
cp "$root/usr/bin/busybox" "$QVM_WORK/busybox"
mkdir -p "$QVM_WORK/modules"
cp -r "$root/usr/lib/modules/$release/." "$QVM_WORK/modules"
echo "$release" >"$QVM_WORK/release"
# A Python that runs outside the image: to compile the agent for the very version that will import it.
python=$(readlink -f "$root/usr/bin/python3")
python="$root/usr/bin/$(basename "$python")"
mkdir -p "$QVM_WORK/python/lib"
cp "$python" "$QVM_WORK/python/python"
chroot "$root" ldd "/usr/bin/$(basename "$python")" | grep -o '/[^ ]*' | while read -r library; do
	cp -L "$root$library" "$QVM_WORK/python/lib"
done
mkdir -p "$QVM_WORK/python/home/lib/$(basename "$python")"
cp -r "$root/usr/lib/$(basename "$python")/encodings" "$QVM_WORK/python/home/lib/$(basename "$python")/"

# QEMU enters an uncompressed x86 kernel by its PVH note and so skips unpacking, which under emulation takes 0.7 s.
image="$root/boot/vmlinuz-$release"
cp "$image" "$QVM_WORK/kernel"
if [ "$QVM_ARCH" = amd64 ]; then
	offset=$(LC_ALL=C grep -obUaP '\x28\xb5\x2f\xfd' "$image" | head -n 1 | cut -d : -f 1)
	tail -c "+$((offset + 1))" "$image" >"$root/tmp/payload"
	# What follows the payload is no part of it, so zstd complains at the end, after having written everything.
	chroot "$root" zstd -qdcf /tmp/payload >"$QVM_WORK/vmlinux" 2>/dev/null || true
	rm "$root/tmp/payload"
	if [ "$(head -c 4 "$QVM_WORK/vmlinux" | od -An -c | tr -d ' ')" = '177ELF' ]; then
		mv "$QVM_WORK/vmlinux" "$QVM_WORK/kernel"
	else
		rm "$QVM_WORK/vmlinux"
	fi
fi

phase disk
# The file is new, so its holes read as zeros: neither mke2fs nor (noinit_itable) the guest need write any.
mke2fs -q -t ext4 -F -L qvm-root -m 1 -E lazy_itable_init=1,lazy_journal_init=1 -J size=64 \
	-d "$root" "$QVM_WORK/root.raw" "$((QVM_ROOT_BYTES / 1024))k"
rm -rf "$root"

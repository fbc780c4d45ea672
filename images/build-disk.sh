#!/bin/sh
# A folder into an ext4 image, the same bytes for the same tree: build-disk.sh FOLDER IMAGE BYTES NAME
# SOURCE_DATE_EPOCH (seconds) is the time of everything in it that has no time of its own.
set -eu

folder=$1
image=$2
bytes=$3
name=$4

# A UUID made of the name, as version 8 of RFC 9562 has it.
digits=$(printf '%s' "$name" | sha256sum)
uuid=$(printf '%s' "$digits" | sed -E 's/^(.{8})(.{4}).(.{3}).(.{3})(.{12}).*/\1-\2-8\3-8\4-\5/')

# mke2fs learns to heed SOURCE_DATE_EPOCH in 1.47.1; before, this is its own word for it.
export E2FSPROGS_FAKE_TIME="$SOURCE_DATE_EPOCH"
# The file is new, so its holes read as zeros: neither mke2fs nor (noinit_itable) the guest need write any.
mke2fs -q -t ext4 -F -L qvm-root -m 1 -U "$uuid" \
	-E "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0,hash_seed=$uuid" -J size=64 \
	-d "$folder" "$image" "$((bytes / 1024))k"

# It takes over when each file was changed and read on the host, which nobody can set there.
total=$(dumpe2fs -h "$image" 2>/dev/null | sed -n 's/^Inode count: *//p')
free=$(dumpe2fs -h "$image" 2>/dev/null | sed -n 's/^Free inodes: *//p')
seq 2 "$((total - free))" | sed -n -E "/^(3|4|5|6|7|8|9|10)$/!s/.*/sif <&> ctime @$SOURCE_DATE_EPOCH\nsif <&> atime @$SOURCE_DATE_EPOCH/p" |
	debugfs -w -f - "$image" >/dev/null 2>&1

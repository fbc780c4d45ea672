"""Certificates in the guest: authorities for every program, and registries' own for container engines."""

from __future__ import annotations

import io
import tarfile

from qvm.runtime.base import Guest
from qvm.runtime.network import Network

# Ours lie where the distribution's own tool takes them from, so a later run of that tool keeps them. Running it costs
# seconds under software emulation, so what it would do is done here: the bundle that Go, curl and git read, and the
# links by hash that OpenSSL (and so Python) looks up.
_INSTALL = """
set -e
list=/etc/qvm/certificates
if [ -e $list ]; then
    while read -r file; do rm -f "$file"; done <$list
    rm -f $list
fi
bundle=
for each in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt; do
    [ -e $each ] && [ -z "$bundle" ] && bundle=$(readlink -f $each)
done
if [ -n "$bundle" ] && grep -q '^# qvm begin' "$bundle"; then
    sed -i '/^# qvm begin/,/^# qvm end/d' "$bundle"
fi
[ "$1" = some ] || exit 0
mkdir -p /etc/qvm /etc/docker/certs.d
umask 077
tar -xf - -C /
umask 022
while read -r file; do
    case $file in
    /usr/local/share/ca-certificates/*)
        chmod 0644 "$file"
        [ -z "$bundle" ] || { echo "# qvm begin"; cat "$file"; echo "# qvm end"; } >>"$bundle"
        if command -v openssl >/dev/null && [ -d /etc/ssl/certs ]; then
            name=$(openssl x509 -noout -subject_hash -in "$file") || continue
            number=0
            while [ -e "/etc/ssl/certs/$name.$number" ]; do number=$((number + 1)); done
            ln -s "$file" "/etc/ssl/certs/$name.$number"
            echo "/etc/ssl/certs/$name.$number" >>$list.links
        fi ;;
    esac
done <$list
if [ -e $list.links ]; then cat $list.links >>$list; rm $list.links; fi
if [ -d /etc/pki/ca-trust/source/anchors ]; then
    cp /usr/local/share/ca-certificates/qvm-*.crt /etc/pki/ca-trust/source/anchors/ 2>/dev/null && update-ca-trust
fi
exit 0
"""


async def install_certificates(guest: Guest, network: Network, *, fresh: bool) -> None:
    """Have the guest trust what `network` says, and nothing more that an earlier call brought.

    `fresh`: there was no earlier call in this guest, so where there are no certificates there is nothing to do.
    """
    files = certificate_files(network)
    if fresh and not files:
        return
    await guest.exec(
        ["sh", "-c", _INSTALL, "install", "some" if files else "none"], input=pack(files) if files else b"",
    )


def certificate_files(network: Network) -> dict[str, bytes]:
    """Path in the guest -> content."""
    files = {
        f"/usr/local/share/ca-certificates/qvm-{number}.crt": data for number, data in enumerate(network.authorities)
    }
    return files | {f"/etc/docker/certs.d/{name}": data for name, data in sorted(network.registry_files.items())}


def pack(files: dict[str, bytes]) -> bytes:
    """A tar of the files and of the list of them, for the root folder."""
    listed = "".join(f"{name}\n" for name in files).encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in {**files, "/etc/qvm/certificates": listed}.items():
            entry = tarfile.TarInfo(name.lstrip("/"))
            entry.size, entry.mode = len(data), 0o600
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()

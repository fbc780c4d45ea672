#!/usr/bin/env bash
# After `make start`: how to type just `qvm`.
set -euo pipefail

qvm="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/qvm"
if [ "$(id -u)" = 0 ]; then
	folder=/usr/local/bin
else
	folder=$HOME/.local/bin
fi
if [ "$(readlink -f "$(command -v qvm || true)" 2>/dev/null)" = "$(readlink -f "$qvm")" ]; then
	exit 0
fi
cat <<HINT

qvm is $qvm. To type just \`qvm\`:
    mkdir -p "$folder" && ln -sf "$qvm" "$folder/qvm"
HINT
case ":$PATH:" in
*":$folder:"*) ;;
*) echo "    export PATH=\"$folder:\$PATH\"     # and put this line into your shell's profile" ;;
esac

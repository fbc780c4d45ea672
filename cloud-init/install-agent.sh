#!/bin/sh
# Starts qvm's agent, for good, on an image that was not made for it: under systemd or OpenRC. Runs at each boot.
# usage: install-agent.sh FOLDER, which holds agent.py and qvm-agent.service
set -eu
seed=$1
# The console is what the host shows when something fails.
if (: >/dev/console) 2>/dev/null; then exec >/dev/console 2>&1; fi
trap '[ $? = 0 ] || echo "qvm: the agent could not be installed"' EXIT

if ! command -v python3; then
    echo "qvm: this image has no python3, which qvm's agent needs"
    exit 1
fi
mkdir -p /usr/lib/qvm
if ! cmp -s "$seed/agent.py" /usr/lib/qvm/agent.py; then
    cp "$seed/agent.py" /usr/lib/qvm/agent.py.new
    chmod 0755 /usr/lib/qvm/agent.py.new
    mv /usr/lib/qvm/agent.py.new /usr/lib/qvm/agent.py
fi

if [ -d /run/systemd/system ]; then
    unit=/etc/systemd/system/qvm-agent.service
    if ! cmp -s "$seed/qvm-agent.service" "$unit"; then
        cp "$seed/qvm-agent.service" "$unit"
        chmod 0644 "$unit"
        # Fedora and its like: what lies under /usr/lib and /etc must be labelled so that systemd may start it.
        if command -v restorecon >/dev/null; then restorecon -R /usr/lib/qvm "$unit"; fi
        systemctl daemon-reload
        systemctl enable qvm-agent.service
    fi
    systemctl start --no-block qvm-agent.service
    exit 0
fi

if [ ! -e /etc/init.d/qvm-agent ]; then
    cat >/etc/init.d/qvm-agent <<'SCRIPT'
#!/sbin/openrc-run
description="qvm guest agent"
command=/usr/bin/python3
command_args="-I -S /usr/lib/qvm/agent.py"
supervisor=supervise-daemon
respawn_delay=1
depend() {
    need localmount
    before sshd
}
SCRIPT
    chmod 0755 /etc/init.d/qvm-agent
    rc-update add qvm-agent default
fi
# Beside the boot, not in it: OpenRC would have one service wait for the other.
rc-service qvm-agent --ifnotstarted start &

#!/usr/bin/env bash
# Debian packages that the slow tests use: a Slurm of this machine's own, and a browser for reports.
# Tests that miss theirs skip and say so, therefore this never fails.
set -u

missing() {
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null &&
        command -v sbatch >/dev/null || printf '%s\n' slurm-wlm
    command -v munged >/dev/null || printf '%s\n' munge
    command -v chromium >/dev/null || printf '%s\n' chromium
}

PATH=$PATH:/usr/sbin:/sbin
wanted=$(missing)
if [[ -z $wanted ]]; then
    echo "system packages: all there"
    exit 0
fi

if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
    echo "system packages missing (install them as root):" $wanted
    exit 0
fi

export DEBIAN_FRONTEND=noninteractive
install() {
    # Word splitting is meant: one word a package.
    # shellcheck disable=SC2086
    apt-get install -y -q --no-install-recommends $wanted
}
log=$(mktemp)
{ install || { apt-get update -q && install; }; } >"$log" 2>&1 || tail -n 5 "$log"
rm -f "$log"

wanted=$(missing)
if [[ -n $wanted ]]; then
    echo "system packages still missing:" $wanted
else
    echo "system packages: installed"
fi
exit 0

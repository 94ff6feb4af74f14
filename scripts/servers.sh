#!/usr/bin/env bash
# What the tests need that no Python package brings: OpenSSH's sshd, PostgreSQL, PgBouncer, MariaDB, Chromium, faketime, Debian's
# rclone (named by its path: a newer one comes with a Python package). With --bench also what only the benchmarks need: HAProxy.
# Installed where they can be (root on Debian or Ubuntu); otherwise named, and the tests that need them say so.
# No service of them is started, now or at the next boot.
set -euo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin:$(printf '%s:' /usr/lib/postgresql/*/bin)
declare -A package=([sshd]=openssh-server [chromium]=chromium [postgres]=postgresql [mariadbd]=mariadb-server [pgbouncer]=pgbouncer [ssh-agent]=openssh-client [unzip]=unzip [faketime]=faketime [/usr/bin/rclone]=rclone)
[[ ${1:-} != --bench ]] || package+=([haproxy]=haproxy)
declare -A service=([sshd]="ssh ssh.socket" [postgres]=postgresql [mariadbd]=mariadb [pgbouncer]=pgbouncer [haproxy]=haproxy)

list_missing() {
  for program in "${!package[@]}"; do
    command -v "$program" >/dev/null || echo "$program"
  done
}

install_packages() {
  local policy=/usr/sbin/policy-rc.d
  export DEBIAN_FRONTEND=noninteractive
  if [[ ! -e $policy ]]; then # Debian starts a service that it installs, unless this file says no
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
  fi
  apt-get update -qq -o DPkg::Lock::Timeout=120 || return
  for program in "$@"; do
    apt-get install -y -qq -o DPkg::Lock::Timeout=120 --no-install-recommends "${package[$program]}" || return
    for name in ${service[$program]:-}; do
      update-rc.d "${name%.socket}" disable || true
      systemctl disable "$name" || true
    done
  done
}

mapfile -t missing < <(list_missing)
((${#missing[@]} == 0)) && exit 0
if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
  echo "servers: installing ${missing[*]}"
  if ! output=$(install_packages "${missing[@]}" 2>&1); then
    tail -n 20 <<<"$output" >&2
  fi
  mapfile -t missing < <(list_missing)
fi
((${#missing[@]} == 0)) || echo "servers: not installed: ${missing[*]} (the tests that need them will say so)" >&2

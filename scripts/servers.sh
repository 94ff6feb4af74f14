#!/usr/bin/env bash
# The servers the tests talk to that no Python package brings: OpenSSH's sshd and Chromium.
# Installed where they can be (root on Debian or Ubuntu); otherwise named, and the tests that need them say so.
set -euo pipefail
declare -A package=([sshd]=openssh-server [chromium]=chromium)
missing=()
for program in "${!package[@]}"; do
  command -v "$program" >/dev/null || test -x "/usr/sbin/$program" || missing+=("$program")
done
((${#missing[@]} == 0)) && exit 0
if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
  echo "servers: installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  # Debian starts a service it installs, where an init system runs; these are only for the tests.
  for program in "${missing[@]}"; do
    RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${package[$program]}" >/dev/null
  done
else
  echo "servers: not installed: ${missing[*]} (the tests that need them will say so)" >&2
fi

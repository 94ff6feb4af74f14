#!/usr/bin/env bash
# MySQL itself for the tests, beside MariaDB. Debian carries it in its unstable suite only, for a newer C library than
# this machine's: so it is unpacked with its own libraries into the folder given as $1 and installed nowhere.
# $1/ncr-mysqld runs it; $1/empty is a fresh data folder, whose making takes longer than its copying.
set -euo pipefail
to=$(realpath -m "$1")
[[ -d $to/empty ]] && exit 0
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
if [[ ! -e $keyring || $(dpkg --print-architecture) != amd64 ]]; then
  echo "mysql: not fetched: this is no Debian on amd64" >&2
  exit 1
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists,cache,debs,root}
# From where this machine gets its packages.
mirror=$(apt-cache policy | grep -om1 'https\?://[^ ]*/debian ') || {
  echo "mysql: not fetched: apt names no mirror of Debian" >&2
  exit 1
}
echo "deb [signed-by=$keyring] $mirror unstable main" >"$work/sources.list"
apt() {
  local command=$1
  shift
  "$command" -qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$work/lists" \
    -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root -o Acquire::Languages=none "$@"
}
apt apt-get update
mapfile -t packages < <(apt apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks \
  --no-replaces --no-enhances mysql-server-core | grep -E '^[a-z]' | grep -vE '^(perl|libperl|libgdbm)' | sort -u)
(cd "$work/debs" && apt apt-get download "${packages[@]}")
for package in "$work"/debs/*.deb; do
  dpkg-deb -x "$package" "$work/root"
done
rm -rf "$to"
mkdir -p "$to/lib"
cp -a "$work"/root/usr/lib/x86_64-linux-gnu/*.so* "$to/lib/"
cp -a "$work/root/usr/sbin/mysqld" "$to/server"
cp -a "$work/root/usr/share/mysql" "$to/share"
cat >"$to/ncr-mysqld" <<END
#!/bin/sh
exec "$to/lib/ld-linux-x86-64.so.2" --library-path "$to/lib" "$to/server" --no-defaults --lc-messages-dir="$to/share" \\
  --secure-file-priv= "\$@"
END
chmod 755 "$to/ncr-mysqld"
as_user=()
if [[ $(id -u) == 0 ]]; then as_user=(--user=root); fi
"$to/ncr-mysqld" --initialize-insecure --datadir="$to/making" --innodb-redo-log-capacity=8M "${as_user[@]}" 2>"$work/log" || {
  tail -n 20 "$work/log" >&2
  exit 1
}
mv "$to/making" "$to/empty"

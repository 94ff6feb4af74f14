#!/bin/sh
# PostgreSQL for trying the service out: database and user `studio`, password in DATABASE_PASSWORD.
set -eu
for folder in /usr/lib/postgresql/*/bin; do PATH=$folder:$PATH; done
data=/var/lib/postgresql/ncr/data
if [ "${1:-}" = ready ]; then exec pg_isready -q -h 127.0.0.1 -d studio; fi
if [ ! -f "$data/ready" ]; then
    rm -rf "$data"
    umask 077
    printf '%s' "$DATABASE_PASSWORD" >/tmp/password
    initdb -D "$data" -U studio --pwfile=/tmp/password -A scram-sha-256 -E UTF8 --locale=C.UTF-8 >/dev/null
    rm /tmp/password
    echo 'host all all all scram-sha-256' >>"$data/pg_hba.conf"
    echo 'CREATE DATABASE studio;' | postgres --single -D "$data" postgres >/dev/null
    touch "$data/ready"
fi
exec postgres -D "$data" -c listen_addresses='*' -c unix_socket_directories=/tmp -c max_connections=200

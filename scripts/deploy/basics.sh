# shellcheck shell=bash
# Part of deploy.sh: what it says and runs, .env, the containers of this project, the journal (what runs, what ran before, what was begun), the lock.

say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
fail() { # what, what next
  printf 'deploy.sh: %s\n  next: %s\n' "$1" "$2" >&2
  exit 1
}
refuse() { # what, what next
  printf 'deploy.sh: %s\n  next: %s\n' "$1" "$2" >&2
  exit 2
}
take_no() { # VERB ARGUMENT...: for a verb that takes none
  (($# == 1)) || refuse "$1 does not know $2" "./deploy.sh --help"
}
run() { # a command that changes something
  if $DRY_RUN; then
    printf 'would run: %s\n' "$*" >&2
  else
    "$@"
  fi
}

env_value() { # NAME: its value in .env, without quotes
  local value
  value=$(sed -n "s/^$1=//p" .env | tail -n 1)
  value=${value%$'\r'}
  case $value in
    \"*\") value=${value#\"} value=${value%\"} ;;
    \'*\') value=${value#\'} value=${value%\'} ;;
  esac
  printf '%s' "$value"
}

write_env() { # FILE NAME VALUE: set one line, at once
  local partial=$1.$$
  (umask 077 && NAME=$2 VALUE=$3 awk '
    BEGIN { name = ENVIRON["NAME"]; line = name "=" ENVIRON["VALUE"] }
    index($0, name "=") == 1 { if (!done) print line; done = 1; next }
    { print }
    END { if (!done) print line }' "$1" >"$partial")
  mv -f "$partial" "$1"
}

project() {
  local name=${COMPOSE_PROJECT_NAME:-$(env_value COMPOSE_PROJECT_NAME)}
  printf '%s' "${name:-ncr}"
}
compose() { docker compose "$@"; }
containers() { # SERVICE [STATE...]: ids, also of those that have stopped
  docker ps -aq --no-trunc --filter "label=com.docker.compose.project=$(project)" \
    --filter "label=com.docker.compose.service=$1" --filter "label=com.docker.compose.oneoff=False" "${@:2}"
}
release_of() { docker inspect -f '{{index .Config.Labels "ncr.generation"}}' "$1" 2>/dev/null || true; }
of_generation() { # SERVICE GENERATION [STATE...]: ids
  containers "$1" --filter "label=ncr.generation=$2" "${@:3}"
}
not_of_generation() { # SERVICE GENERATION: ids
  local id
  for id in $(containers "$1"); do
    [[ $(release_of "$id") == "$2" ]] || printf '%s\n' "$id"
  done
}
count() { grep -c . || true; }
replicas() {
  local number
  case $1 in
    web) number=$(env_value NCR_WEB_REPLICAS) ;;
    worker) number=$(env_value NCR_WORKER_REPLICAS) ;;
    *) number=1 ;;
  esac
  printf '%s' "${number:-2}"
}

declare -A JOURNAL=()
read_journal() {
  local name value
  JOURNAL=([current]='' [previous]='' [target]='' [step]='')
  [[ -f $STATE_DIR/journal ]] || return 0
  while IFS='=' read -r name value; do JOURNAL[$name]=$value; done <"$STATE_DIR/journal"
}
write_journal() { # NAME=VALUE...
  local pair name
  $DRY_RUN && return
  for pair in "$@"; do JOURNAL[${pair%%=*}]=${pair#*=}; done
  for name in "${!JOURNAL[@]}"; do printf '%s=%s\n' "$name" "${JOURNAL[$name]}"; done >"$STATE_DIR/journal.new"
  sync "$STATE_DIR/journal.new" 2>/dev/null || true
  mv -f "$STATE_DIR/journal.new" "$STATE_DIR/journal"
}

take_lock() {
  mkdir -p "$STATE_DIR"
  exec 9>>"$STATE_DIR/lock"
  local owner
  owner=$(cat "$STATE_DIR/owner" 2>/dev/null || true)
  if ! flock -n 9; then
    [[ -z $owner || -d /proc/$owner ]] &&
      refuse "another deploy.sh is at work here (process ${owner:-unknown})" "wait for it, or look at it: ps -fp ${owner:-PID}"
    say "an earlier deploy.sh (process $owner) was killed; waiting for the commands it had started"
    flock -w 180 9 || refuse "what the killed deploy.sh had started still runs" "see: ps -ef | grep 'docker compose'"
  fi
  echo $$ >"$STATE_DIR/owner"
}

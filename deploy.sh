#!/usr/bin/env bash
# Runs releases of NCR Upload API on this host's Docker, without a failed request or a lost job. `./deploy.sh --help`.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"

STATE_DIR=var/deploy
BACKUP_DIR=var/backups
MIN_FREE_MB=${DEPLOY_MIN_FREE_MB:-3000}
HEALTHY_SECONDS=${DEPLOY_HEALTHY_SECONDS:-120}
KEEP_BACKUPS=${DEPLOY_KEEP_BACKUPS:-14}
WORKER_STOP_SECONDS=360 # stop_grace_period of docker-compose.yml
ROLLING=(web worker beat)
DRY_RUN=false

usage() {
  cat <<'HELP'
usage: ./deploy.sh COMMAND [options]

  init [--embedded]         write .env from env_sample with random secrets (--embedded: for trying it out, no outside part needed);
                            an .env that is there keeps what it says and gets the secrets it lacks
  deploy [RELEASE]          build this checkout as RELEASE (default: the commit), check it, back up, migrate, roll it out
         [--pull|--no-build]  take the image NCR_IMAGE:RELEASE from its registry, or as it is here, instead of building it
  rollback                  go back to the release before, the same gentle way
  health                    the state of every container and part; exit status 1 unless all is well
  monitor [--once] [--json] a live table: containers, load, jobs
  backup                    save the SQL ledger and Redis to var/backups/
  restore BACKUP [--yes]    put the tasks of a backup that the ledger has lost back into it; delivers nothing again
  cleanup                   remove old releases, dead containers and old backups
  logs [SERVICE...]         follow the logs: proxy web worker beat flower redis

  --dry-run                 with deploy, rollback, restore, cleanup: say what would be done, change nothing
  --help

Exit status: 0 done; 1 failed, with what ran before still running; 2 refused before anything was touched.
Variables: DEPLOY_MIN_FREE_MB (3000), DEPLOY_HEALTHY_SECONDS (120), DEPLOY_KEEP_BACKUPS (14).
HELP
}

# --- words ------------------------------------------------------------------------------------------------------

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

# --- .env -------------------------------------------------------------------------------------------------------

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

# --- Docker -----------------------------------------------------------------------------------------------------

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

# --- the journal: what runs, what ran before, and what was begun -------------------------------------------------

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

# --- before anything is touched -----------------------------------------------------------------------------------

check_engine() {
  command -v docker >/dev/null || refuse "docker is not installed" "install Docker Engine and its Compose plugin (2.24 or newer)"
  docker info >/dev/null 2>&1 ||
    refuse "no Docker engine answers" "start it (systemctl start docker), join the group docker or use sudo, or set DOCKER_HOST"
  local version
  version=$(docker compose version --short 2>/dev/null) || refuse "Docker Compose v2 is missing" "install the package docker-compose-plugin"
  printf '%s\n' 2.24 "${version#v}" | sort -CV || refuse "Docker Compose is $version, and 2.24 is needed" "update the package docker-compose-plugin"
}

require_env() {
  [[ -f .env ]] || refuse "there is no .env" "./deploy.sh init, then fill in what has no value"
  [[ -r .env ]] || refuse ".env cannot be read by $(id -un)" "run this as its owner: ls -l .env"
}

check_env() {
  require_env
  local name grace missing=()
  for name in API_KEY REDIS_PASSWORD FLOWER_BASIC_AUTH WASABI_ENDPOINT WASABI_ACCESS_KEY WASABI_SECRET_KEY BUCKET_NAME SFTP_HOST \
    SFTP_USERNAME; do
    [[ -n $(env_value $name) ]] || missing+=("$name")
  done
  [[ -n $(env_value SFTP_HOST_KEY)$(env_value SFTP_KNOWN_HOSTS) ]] || missing+=("SFTP_HOST_KEY (or SFTP_KNOWN_HOSTS)")
  [[ -n $(env_value SFTP_PASSWORD)$(env_value SFTP_PRIVATE_KEY) ]] || missing+=("SFTP_PASSWORD (or SFTP_PRIVATE_KEY)")
  if [[ -z $(env_value DATABASE_URL) && $(env_value DB_TYPE) != mysql && $(env_value DB_TYPE) != postgresql ]]; then
    missing+=("DATABASE_URL (or DB_TYPE=mysql|postgresql and DB_*; SQLite cannot be shared by containers)")
  fi
  ((${#missing[@]} == 0)) || refuse "not set in .env: $(printf '%s; ' "${missing[@]}")" "edit .env; env_sample says what each means"
  grace=$(env_value WORKER_GRACE_SECONDS)
  [[ ! ${grace:-0} =~ ^[0-9]+$ ]] || ((${grace:-0} + 15 <= WORKER_STOP_SECONDS)) ||
    refuse "WORKER_GRACE_SECONDS=$grace leaves a worker no time to hand its jobs over" "at most $((WORKER_STOP_SECONDS - 15)): docker-compose.yml stops a worker for good after $WORKER_STOP_SECONDS s"
  compose config -q || refuse "docker-compose.yml and .env do not go together (above)" "correct what it names"
}

check_disk() {
  local place free
  for place in . "$(docker info -f '{{.DockerRootDir}}')"; do
    [[ -d $place ]] || continue # an engine on another host
    free=$(($(df -Pk "$place" | awk 'NR == 2 { print $4 }') / 1024))
    ((free >= MIN_FREE_MB)) ||
      refuse "only $free MB are free at $place, and a release needs $MIN_FREE_MB" "./deploy.sh cleanup, or free space; DEPLOY_MIN_FREE_MB sets the limit"
  done
}

check_ports() { # those of services that do not run yet
  local pair service port
  for pair in proxy:API_PORT:8001 flower:FLOWER_PORT:5555 redis:REDIS_PORT:6380; do
    service=${pair%%:*} port=$(env_value "$(cut -d: -f2 <<<"$pair")")
    port=${port:-${pair##*:}}
    [[ -z $(containers "$service") ]] || continue
    if (exec 8<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      refuse "port $port is taken, and $service needs it" "stop what listens there (ss -ltnp 'sport = :$port'), or set $(cut -d: -f2 <<<"$pair") in .env"
    fi
  done
}

# --- one release --------------------------------------------------------------------------------------------------

default_release() {
  local commit
  commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo local)
  [[ -z $(git status --porcelain --untracked-files=no 2>/dev/null || echo x) ]] || commit+=-$(date -u +%Y%m%d%H%M%S)
  printf '%s' "$commit"
}

generation_of() { # RELEASE: the release together with the settings it runs with
  printf '%s.%s' "$1" "$({ grep -Ev '^NCR_(RELEASE|GENERATION)=' .env; cat docker-compose.yml; } | sha256sum | cut -c1-8)"
}

use_release() { # RELEASE GENERATION: for every compose command from now on
  export NCR_RELEASE=$1 NCR_GENERATION=$2
}

image() {
  local name
  name=$(env_value NCR_IMAGE)
  printf '%s:%s' "${name:-ncr-upload}" "$NCR_RELEASE"
}

get_image() { # build|pull|none
  case $1 in
    build)
      say "building $(image)"
      run compose build --quiet web || fail "the image could not be built (above)" "mend it; what runs is untouched"
      ;;
    pull)
      run docker pull --quiet "$(image)" >/dev/null || fail "$(image) could not be pulled" "check the tag and docker login; what runs is untouched"
      ;;
    none) ;;
  esac
  $DRY_RUN || docker image inspect "$(image)" >/dev/null 2>&1 || fail "there is no image $(image) here" "build it (./deploy.sh deploy) or take it with --pull"
}

in_image() { run compose --progress quiet run --rm --no-deps -T migrate "$@"; }

start_redis() {
  run compose up -d --no-deps --no-recreate redis || fail "redis could not be started (above)" "./deploy.sh logs redis"
  $DRY_RUN || wait_healthy redis "$(containers redis)" || fail "redis is not healthy" "./deploy.sh logs redis"
}

preflight() { # sets PENDING: how many migrations there are to run
  local told
  say "preflight: every outside part, tried by the new image"
  told=$(run compose --progress quiet run --rm --no-deps -T --entrypoint sh migrate -c 'ncr doctor --before-upgrade >&2 && ncr db plan') ||
    fail "the new release cannot work here (above)" "do what is said above; what runs is untouched"
  say "$told"
  PENDING=$(grep -Eo '[0-9]+ migrations' <<<"$told" | cut -d' ' -f1 || true)
}

state_of() { docker inspect -f '{{.State.Status}} {{if .State.Health}}{{.State.Health.Status}}{{else}}healthy{{end}} {{.RestartCount}}' "$1" 2>/dev/null; }

works_now() { # ID HEALTH: asks at once what Docker asks at its next interval
  [[ $2 == healthy ]] || { [[ $2 == starting ]] && docker exec "$1" python -IS /opt/ncr/bin/probe.py >/dev/null 2>&1; }
}

wait_healthy() { # NAME IDS: false as soon as one of them cannot become healthy
  local deadline=$((SECONDS + HEALTHY_SECONDS)) id status health restarts waiting
  local -A at_first=() # one that has been running may have been restarted before
  while :; do
    waiting=''
    for id in $2; do
      read -r status health restarts <<<"$(state_of "$id")" || true
      : "${at_first[$id]:=${restarts:-0}}"
      if [[ $status != running && $status != created ]] || ((${restarts:-0} > at_first[$id])) || [[ $health == unhealthy ]]; then
        say "$1: container ${id:0:12} is ${status:-gone}, $health, restarted ${restarts:-0} times; its last words:"
        docker logs --tail 15 "$id" 2>&1 | sed 's/^/    /' >&2
        return 1
      fi
      [[ $status == running ]] && works_now "$id" "$health" || waiting+=" ${id:0:12}"
    done
    [[ -n $waiting ]] || return 0
    if ((SECONDS > deadline)); then
      say "$1: not healthy after $HEALTHY_SECONDS s:$waiting; their last words:"
      for id in $waiting; do docker logs --tail 15 "$id" 2>&1 | sed 's/^/    /' >&2; done
      return 1
    fi
    sleep 0.5
  done
}

start_beside() { # SERVICE...: the wanted number of containers of this generation, beside whatever else runs
  local service have want dead scale=()
  for service in "$@"; do
    dead=$(containers "$service" --filter status=exited --filter status=dead --filter status=created)
    # shellcheck disable=SC2086 # ids
    [[ -z $dead ]] || run docker rm -f $dead >/dev/null
    have=$(of_generation "$service" "$NCR_GENERATION" | count)
    want=$(replicas "$service")
    ((have >= want)) || scale+=(--scale "$service=$(($(containers "$service" | count) + want - have))" "$service")
  done
  ((${#scale[@]} == 0)) || run compose --progress quiet up -d --no-deps --no-build --no-recreate "${scale[@]}"
}

seen_by_proxy() { # until HAProxy sends requests to every web container of this generation
  local deadline=$((SECONDS + 60)) ids id address seen missing addresses=()
  ids=$(of_generation web "$NCR_GENERATION")
  for id in $ids; do
    addresses+=("$(docker inspect -f "{{(index .NetworkSettings.Networks \"$(project)_edge\").IPAddress}}" "$id")")
  done
  while :; do
    seen=$(docker exec "${ids%%$'\n'*}" python -IS /opt/ncr/bin/probe.py seen 'http://proxy:8404/stats;csv' 2>/dev/null || true)
    missing=''
    for address in "${addresses[@]}"; do
      grep -qx "$address UP" <<<"$seen" || missing+=" $address"
    done
    [[ -n $missing ]] || return 0
    ((SECONDS < deadline)) || { say "the proxy does not see$missing"; return 1; }
    sleep 0.5
  done
}

stop_gently() { # SERVICE...: those of other generations, all at once, each within its stop_grace_period
  local service old=''
  for service in "$@"; do old+=" $(not_of_generation "$service" "$NCR_GENERATION")"; done
  [[ -n ${old//[[:space:]]/} ]] || return 0
  say "$*: $(wc -w <<<"$old") old stop, after what they have begun"
  # shellcheck disable=SC2086 # ids
  run docker stop $old >/dev/null
  # shellcheck disable=SC2086
  run docker rm -f $old >/dev/null
}

rolling_of_generation() { # ids of every rolling service
  local service
  for service in "${ROLLING[@]}"; do of_generation "$service" "$NCR_GENERATION"; done
}

take_back() { # remove what was started of this generation, as gently: the proxy may send it requests. Whatever ran before was not touched
  local ids
  ids=$(rolling_of_generation | grep -vxF -f <(tr ' ' '\n' <<<"${JOURNAL[kept]:-none}") || true)
  if [[ -n ${ids//[[:space:]]/} ]]; then
    # shellcheck disable=SC2086 # ids
    run docker stop $ids >/dev/null
    # shellcheck disable=SC2086
    run docker rm -f $ids >/dev/null
  fi
  write_journal target= step=
}

start_proxy() {
  local hash
  hash=$(cat docker/haproxy/* | sha256sum | cut -c1-16)
  if [[ -z $(containers proxy --filter status=running) ]]; then
    run compose --progress quiet up -d --no-deps proxy
  elif [[ ${JOURNAL[proxy]:-} != "$hash" ]]; then
    say "proxy: takes its new configuration over, without dropping a connection"
    run compose exec -T proxy haproxy -c -q -f /usr/local/etc/haproxy/haproxy.cfg
    run compose kill -s USR2 proxy >/dev/null 2>&1
  fi
  write_journal "proxy=$hash"
}

bring_up() { # new containers beside the old ones, healthy and seen; false if they do not come to that
  local service
  say "$(replicas web) new web and $(replicas worker) new worker containers start beside the old"
  start_beside web worker || return 1
  $DRY_RUN && return
  for service in web worker; do
    wait_healthy "$service" "$(of_generation "$service" "$NCR_GENERATION")" || return 1
  done
  start_proxy && seen_by_proxy
}

switch_over() { # only forwards from here: everything new is healthy
  write_journal step=switch
  run write_env .env NCR_RELEASE "$NCR_RELEASE"
  run write_env .env NCR_GENERATION "$NCR_GENERATION"
  stop_gently web worker
  start_beside beat
  $DRY_RUN || wait_healthy beat "$(of_generation beat "$NCR_GENERATION")" || say "beat is not healthy: look at ./deploy.sh logs beat; jobs in flight go on"
  stop_gently beat
  run compose --progress quiet up -d --no-deps --no-build flower || say "flower did not start (above); nothing else needs it"
  if [[ ${JOURNAL[current]} != "$NCR_RELEASE" ]]; then
    write_journal "previous=${JOURNAL[current]}" "current=$NCR_RELEASE"
  fi
  write_journal target= step=
}

roll_out() { # RELEASE: exit status 1, with the old one as it was, when it does not become healthy
  trap 'say "interrupted"; exit 1' INT TERM
  trap 'undo_unfinished' EXIT
  write_journal "target=$NCR_RELEASE" "generation=$NCR_GENERATION" "kept=$(rolling_of_generation | xargs)" step=start
  if ! bring_up; then
    say "release $NCR_RELEASE does not become healthy: it is taken back"
    take_back
    fail "release $NCR_RELEASE was taken back; ${JOURNAL[current]:-nothing} runs as before" "read its last words above, mend it, deploy again"
  fi
  switch_over
  trap - EXIT INT TERM
}

undo_unfinished() {
  [[ ${JOURNAL[step]} == start ]] || return 0
  say "taking back what was started of $NCR_RELEASE"
  take_back
}

recover() { # what a killed deploy.sh left: finished if its new containers were good, else undone
  [[ -n ${JOURNAL[step]} ]] || return 0
  say "an earlier run was killed while it rolled out ${JOURNAL[target]} (step ${JOURNAL[step]})"
  use_release "${JOURNAL[target]}" "${JOURNAL[generation]}"
  if [[ ${JOURNAL[step]} == switch ]]; then
    say "it had passed its checks: finishing it"
    bring_up || fail "${JOURNAL[target]} is not healthy any more" "./deploy.sh logs; then deploy a release that is"
    switch_over
  else
    say "it had not passed its checks: undoing it"
    take_back
  fi
  unset NCR_RELEASE NCR_GENERATION
}

is_running() { # the wanted generation, everywhere and alone, with what it stands on
  local service
  for service in proxy flower redis; do
    [[ -n $(containers "$service" --filter status=running) ]] || return 1
  done
  for service in "${ROLLING[@]}"; do
    [[ $(of_generation "$service" "$NCR_GENERATION" --filter status=running | count) == "$(replicas "$service")" ]] || return 1
    [[ -z $(not_of_generation "$service" "$NCR_GENERATION") ]] || return 1
  done
}

# --- commands -----------------------------------------------------------------------------------------------------

command_deploy() {
  local source=build release='' began=$SECONDS
  while (($#)); do
    case $1 in
      --pull) source=pull ;;
      --no-build) source=none ;;
      -*) refuse "deploy does not know $1" "./deploy.sh --help" ;;
      *)
        [[ -z $release ]] || refuse "deploy takes one release, not $release and $1" "./deploy.sh --help"
        release=$1
        ;;
    esac
    shift
  done
  release=${release:-$(default_release)}
  [[ $release =~ ^[A-Za-z0-9_][A-Za-z0-9_.-]{0,100}$ ]] || refuse "'$release' cannot be a release: it is an image tag" "use letters, digits, dots and dashes"
  check_engine
  check_env
  take_lock
  read_journal
  check_disk
  check_ports
  $DRY_RUN || recover
  use_release "$release" "$(generation_of "$release")"
  if is_running && [[ $source != build || $release != *-* ]]; then
    say "$release with these settings runs already: nothing to do"
    return
  fi
  get_image "$source"
  start_redis
  preflight
  save_backup before-"$release" >/dev/null
  if [[ $PENDING != 0 ]]; then
    say "migrating"
    in_image db upgrade >&2 || fail "the migration failed (above); the old release goes on with the tables as they are" "mend it, then deploy again"
  fi
  roll_out
  say "release $release runs, $((SECONDS - began)) s"
}

command_rollback() {
  take_no rollback "$@"
  check_engine
  check_env
  take_lock
  read_journal
  $DRY_RUN || recover
  [[ -n ${JOURNAL[previous]} ]] || refuse "there is no earlier release to go back to" "./deploy.sh deploy RELEASE"
  local release=${JOURNAL[previous]} began=$SECONDS
  use_release "$release" "$(generation_of "$release")"
  get_image none
  say "going back from ${JOURNAL[current]} to $release"
  in_image doctor --before-upgrade >&2 || fail "$release cannot work here (above)" "do what is said above; ${JOURNAL[current]} is untouched"
  roll_out
  say "release $release runs again, $((SECONDS - began)) s. The tables stay as they are: migrations only ever add"
}

save_backup() { # [NAME]: prints its folder
  local folder
  folder=$BACKUP_DIR/$(date -u +%Y%m%dT%H%M%SZ)${1:+-$1}
  say "backing up to $folder"
  if $DRY_RUN; then return; fi
  rm -rf "$BACKUP_DIR"/.partial
  (umask 077 && mkdir -p "$BACKUP_DIR/.partial")
  compose run --rm --no-deps -T migrate db backup >"$BACKUP_DIR/.partial/ledger.jsonl.gz" || fail "the ledger could not be saved (above)" "mend it (df -h $BACKUP_DIR); what runs is untouched"
  compose exec -T redis sh -c 'redis-cli -p 6380 --rdb /tmp/ncr.rdb >/dev/null && cat /tmp/ncr.rdb && rm /tmp/ncr.rdb' >"$BACKUP_DIR/.partial/redis.rdb" ||
    fail "Redis could not be saved (above)" "mend it (df -h $BACKUP_DIR; ./deploy.sh logs redis); what runs is untouched"
  (cd "$BACKUP_DIR/.partial" && sha256sum ledger.jsonl.gz redis.rdb >SHA256SUMS)
  mv "$BACKUP_DIR/.partial" "$folder"
  printf '%s\n' "$folder"
}

use_current() {
  use_release "$(env_value NCR_RELEASE)" "$(env_value NCR_GENERATION)"
  [[ -n $NCR_RELEASE && -n $(docker image ls -q "$(image)") ]] || refuse "no release is deployed here" "./deploy.sh deploy"
}

command_backup() {
  take_no backup "$@"
  check_engine
  check_env
  take_lock
  read_journal
  use_current
  save_backup
}

command_restore() {
  local folder='' yes=false answer
  while (($#)); do
    case $1 in
      --yes) yes=true ;;
      -*) refuse "restore does not know $1" "./deploy.sh --help" ;;
      *) folder=${1%/} ;;
    esac
    shift
  done
  check_engine
  check_env
  take_lock
  read_journal
  use_current
  [[ -n $folder && -f $folder/SHA256SUMS ]] || refuse "'$folder' is no backup" "choose one: ls -d $BACKUP_DIR/*/"
  (cd "$folder" && sha256sum -c --quiet SHA256SUMS) || refuse "$folder is damaged" "choose another: ls -d $BACKUP_DIR/*/"
  if ! $yes && ! $DRY_RUN; then
    read -rp "Put the tasks of $folder that the ledger has lost back into it? [y/N] " answer
    [[ $answer == [yY]* ]] || refuse "not confirmed" "answer y, or give --yes"
  fi
  start_redis
  in_image db upgrade >&2 || fail "the ledger's tables could not be made (above)" "./deploy.sh health"
  if $DRY_RUN; then say "would restore $folder"; return; fi
  compose run --rm --no-deps -T migrate db restore <"$folder/ledger.jsonl.gz" || fail "not restored (above); nothing was changed" "mend it and restore again"
}

a_web_container() { # that works
  local id
  for id in $(containers web --filter status=running); do
    if works_now "$id" "$(docker inspect -f '{{.State.Health.Status}}' "$id")"; then
      printf '%s' "$id"
      return
    fi
  done
}

command_health() {
  take_no health "$@"
  check_engine
  check_env
  local service id bad=0 status health restarts web
  for service in proxy web worker beat flower redis; do
    [[ -n $(containers "$service") ]] || { printf '%-8s %-14s missing\n' "$service" -; bad=1; }
    for id in $(containers "$service"); do
      read -r status health restarts <<<"$(state_of "$id")"
      if [[ $health == starting ]] && works_now "$id" "$health"; then health=healthy; fi
      printf '%-8s %-14s %s, %s, restarted %s times\n' "$service" "${id:0:12}" "$status" "$health" "$restarts"
      [[ $status == running && $health == healthy ]] || bad=1
    done
  done
  web=$(a_web_container)
  [[ -n $web ]] || fail "no web container is healthy" "./deploy.sh logs web"
  docker exec "$web" python -IS /opt/ncr/bin/probe.py get '/health?deep=true'
  echo
  docker exec "$web" python -IS /opt/ncr/bin/probe.py get '/health?deep=true' | grep -q '"status":"healthy"' || bad=1
  ((bad == 0)) || fail "not everything is well (above)" "./deploy.sh logs SERVICE"
}

monitor_rows() { # service, container, release, state, CPU, memory: separated by tabs
  local ids
  ids=$(docker ps -q --filter "label=com.docker.compose.project=$(project)")
  [[ -n $ids ]] || return 0
  # shellcheck disable=SC2086 # ids
  join -t $'\t' \
    <(docker ps --filter "label=com.docker.compose.project=$(project)" --format '{{.ID}}\t{{.Label "com.docker.compose.service"}}\t{{.Names}}\t{{.Label "ncr.generation"}}\t{{.Status}}' | sort) \
    <(docker stats --no-stream --format '{{.ID}}\t{{.CPUPerc}}\t{{.MemUsage}}' $ids | sort) | cut -f2- | sort
}

monitor_answers() { # PATH: what the API says, {} when it does not
  local web answer=''
  web=$(a_web_container)
  [[ -z $web ]] || answer=$(docker exec "$web" python -IS /opt/ncr/bin/probe.py get "$1" 2>/dev/null || true)
  printf '%s' "${answer:-{\}}"
}

monitor_json() {
  printf '{"time":"%s","release":"%s","containers":[' "$(date -u +%FT%TZ)" "$(env_value NCR_RELEASE)"
  monitor_rows | awk -F'\t' '{ gsub(/["\\]/, "");
    printf "%s{\"service\":\"%s\",\"name\":\"%s\",\"release\":\"%s\",\"state\":\"%s\",\"cpu\":\"%s\",\"memory\":\"%s\"}", (NR > 1 ? "," : ""), $1, $2, $3, $4, $5, $6 }'
  printf '],"health":%s,"workers":%s,"jobs":%s}\n' "$(monitor_answers '/health')" "$(monitor_answers /celery-stats)" "$(monitor_answers '/jobs/active?limit=10')"
}

monitor_table() {
  printf 'NCR Upload API, release %s, %s\n\n' "$(env_value NCR_RELEASE)" "$(date '+%F %T')"
  { printf 'SERVICE\tCONTAINER\tRELEASE\tSTATE\tCPU\tMEMORY\n'; monitor_rows; } | column -t -s $'\t'
  printf '\nhealth  %s\njobs    %s\n' "$(monitor_answers '/health')" "$(monitor_answers '/jobs/active?limit=3')"
}

command_monitor() {
  local once=false show=monitor_table text
  while (($#)); do
    case $1 in
      --once) once=true ;;
      --json) show=monitor_json ;;
      *) refuse "monitor does not know $1" "./deploy.sh --help" ;;
    esac
    shift
  done
  check_engine
  check_env
  while :; do
    text=$($show)
    if ! $once && [[ $show == monitor_table && -t 1 ]]; then printf '\033[H\033[2J'; fi
    printf '%s\n' "$text"
    if $once; then return; fi
    sleep 3
  done
}

command_cleanup() {
  take_no cleanup "$@"
  check_engine
  check_env
  take_lock
  read_journal
  $DRY_RUN || recover
  local service dead tag name folder
  for service in "${ROLLING[@]}" migrate; do
    dead=$(containers "$service" --filter status=exited --filter status=dead)
    # shellcheck disable=SC2086 # ids
    [[ -z $dead ]] || run docker rm $dead >/dev/null
  done
  name=$(env_value NCR_IMAGE)
  for tag in $(docker image ls "${name:-ncr-upload}" --format '{{.Tag}}'); do
    [[ $tag == "${JOURNAL[current]}" || $tag == "${JOURNAL[previous]}" || $tag == dev || $tag == '<none>' ]] || run docker image rm "${name:-ncr-upload}:$tag" >/dev/null || true
  done
  # Newest first, by name; those that are kept are skipped.
  for folder in $(find "$BACKUP_DIR" -mindepth 1 -maxdepth 1 -type d -name '2*' 2>/dev/null | sort -r | tail -n +$((KEEP_BACKUPS + 1))); do
    run rm -rf "$folder"
  done
  say "cleaned up; kept: ${JOURNAL[current]:-nothing} ${JOURNAL[previous]}, $KEEP_BACKUPS backups"
}

command_logs() {
  local service
  for service in "$@"; do
    [[ $service =~ ^[a-z0-9]+$ ]] || refuse "logs does not know $service" "./deploy.sh --help"
  done
  check_engine
  require_env
  compose logs --follow --tail 200 "$@"
}

secret() { # 32 letters and digits
  local text=''
  while ((${#text} < 32)); do text+=$(head -c 256 /dev/urandom | LC_ALL=C tr -dc 'A-Za-z0-9'); done
  printf '%s' "${text:0:32}"
}

command_init() {
  local embedded=false name empty=() draft=.env.draft
  [[ ${1:-} == --embedded ]] && embedded=true
  [[ -z ${1:-} || $embedded == true ]] || refuse "init does not know $1" "./deploy.sh --help"
  for name in API_KEY REDIS_PASSWORD FLOWER_BASIC_AUTH; do
    [[ -e .env && -n $(env_value $name) ]] || empty+=("$name")
  done
  if [[ -e .env ]] && ! cmp -s .env env_sample && { $embedded || ((${#empty[@]} == 0)); }; then
    refuse "there is a .env already, and what it says is in use" "edit it, or move it away first"
  fi
  (umask 077 && if [[ -e .env ]]; then cp .env $draft; else cp env_sample $draft; fi && chmod 600 $draft)
  for name in "${empty[@]}"; do
    write_env $draft "$name" "$([[ $name != FLOWER_BASIC_AUTH ]] || printf 'operator:')$(secret)"
  done
  if $embedded; then init_embedded $draft; fi
  mkdir -p keys
  mv $draft .env
  say "wrote .env (mode 600), with random values for ${empty[*]}"
  if $embedded; then
    say "next: docker compose --profile embedded up; it serves whoever is on this machine (NCR_BIND, API_ANONYMOUS), on port 8001"
  else
    say "next: fill in the database, WASABI_*, SFTP_* (with SFTP_HOST_KEY), then ./deploy.sh deploy"
  fi
}

init_embedded() { # FILE
  local folder password
  command -v ssh-keygen >/dev/null || refuse "ssh-keygen is not installed, and the SFTP server needs a host key" "install openssh-client"
  folder=$(mktemp -d)
  password=$(secret)
  ssh-keygen -q -t ed25519 -N '' -C ncr-embedded -f "$folder/key"
  local pair
  for pair in "EMBEDDED_DATABASE_PASSWORD=$password" "EMBEDDED_SFTP_HOST_KEY=$(base64 -w 0 <"$folder/key")" \
    "DATABASE_URL=postgresql+psycopg://studio:$password@database:5432/studio" "COMPOSE_PROFILES=embedded" \
    WASABI_ENDPOINT=http://s3:9000 "WASABI_ACCESS_KEY=$(secret)" "WASABI_SECRET_KEY=$(secret)" BUCKET_NAME=studio \
    NCR_BIND=127.0.0.1 API_ANONYMOUS=all SFTP_HOST=sftp SFTP_PORT=2222 SFTP_USERNAME=partner "SFTP_PASSWORD=$(secret)" \
    "SFTP_HOST_KEY=$(cut -d' ' -f1,2 "$folder/key.pub")" VALIDATOR_API_URL=http://validator:8010/validate "VALIDATOR_API_KEY=$(secret)"; do
    write_env "$1" "${pair%%=*}" "${pair#*=}"
  done
  rm -rf "$folder"
}

main() {
  local arguments=() argument
  for argument in "$@"; do
    case $argument in
      --dry-run) DRY_RUN=true ;;
      --help | -h | help)
        usage
        return
        ;;
      *) arguments+=("$argument") ;;
    esac
  done
  set -- "${arguments[@]}"
  case ${1:-} in
    init | deploy | rollback | health | monitor | backup | restore | cleanup | logs) "command_$1" "${@:2}" ;;
    '')
      usage >&2
      exit 2
      ;;
    *) refuse "there is no command '$1'" "./deploy.sh --help" ;;
  esac
}

main "$@"

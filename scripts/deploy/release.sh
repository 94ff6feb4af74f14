# shellcheck shell=bash
# Part of deploy.sh: a release: its name, its image, whether it can work here and whether its containers do.

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

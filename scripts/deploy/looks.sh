# shellcheck shell=bash
# Part of deploy.sh: health and monitor.

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

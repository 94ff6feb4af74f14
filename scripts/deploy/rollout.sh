# shellcheck shell=bash
# Part of deploy.sh: from one release to another, and back when that fails or is killed.

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

proxy_config_is_newer() { # HASH: than what the running proxy has read
  local began
  if [[ -n ${JOURNAL[proxy]:-} ]]; then
    [[ ${JOURNAL[proxy]} != "$1" ]]
  else # started by hand
    began=$(docker inspect -f '{{.State.StartedAt}}' "$(containers proxy --filter status=running | head -n 1)")
    (($(stat -c %Y docker/haproxy/* | sort -n | tail -n 1) > $(date -d "$began" +%s)))
  fi
}

start_proxy() {
  local hash
  hash=$(cat docker/haproxy/* | sha256sum | cut -c1-16)
  if [[ -z $(containers proxy --filter status=running) ]]; then
    run compose --progress quiet up -d --no-deps proxy
  elif proxy_config_is_newer "$hash"; then
    say "proxy: takes its new configuration over"
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

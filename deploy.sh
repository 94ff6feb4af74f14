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

# shellcheck source=scripts/deploy/basics.sh
. scripts/deploy/basics.sh
# shellcheck source=scripts/deploy/checks.sh
. scripts/deploy/checks.sh
# shellcheck source=scripts/deploy/release.sh
. scripts/deploy/release.sh
# shellcheck source=scripts/deploy/rollout.sh
. scripts/deploy/rollout.sh
# shellcheck source=scripts/deploy/records.sh
. scripts/deploy/records.sh
# shellcheck source=scripts/deploy/looks.sh
. scripts/deploy/looks.sh
# shellcheck source=scripts/deploy/init.sh
. scripts/deploy/init.sh

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

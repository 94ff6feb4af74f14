# shellcheck shell=bash
# Part of deploy.sh: backup and restore.

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

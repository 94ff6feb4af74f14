# shellcheck shell=bash
# Part of deploy.sh: the first .env.

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

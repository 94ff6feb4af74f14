# shellcheck shell=bash
# Part of deploy.sh: what is looked at before anything is touched.

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

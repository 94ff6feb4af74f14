#!/usr/bin/env bash
# Run the tests that need no installed server on other versions of Python than that of .venv.
#
#   scripts/pythons.sh test             on every version from 3.11 on that is found (make test-pythons)
#   scripts/pythons.sh test --newest    on the newest one (CI)
#   scripts/pythons.sh venv PYTHON      print the folder for the packages of PYTHON: .venv, or .venv-3.13 beside a .venv of another version
#
# An interpreter is found on PATH, among pyenv's versions, and among those that uv installed.
set -euo pipefail
cd "$(dirname "$0")/.."
TESTS=(tests/domain tests/application)
# Event loops, sockets and processes differ most from one version to the next.
TESTS+=(tests/contract/test_{archive,dropoff_faults,dropoff_wire,queue,validator}.py)
TESTS+=(tests/integration/test_{drain,embedded_sftp_server,fault_proxy,logs,settings,supervisor}.py)

tell_version() { # of a program that runs and can make environments; 0 is none
  "$1" -c 'import sys, ensurepip, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo 0
}

tell_venv() {
  local version
  version=$(tell_version "$1")
  if [[ $version == 0 ]]; then
    echo "PYTHON=$1 does not run, or lacks the modules venv and ensurepip. Name one that does: make test PYTHON=/usr/bin/python3" >&2
    return 1
  fi
  if [[ ! -e .venv/pyvenv.cfg ]] || grep -qE "^version(_info)? = ${version//./\\.}\." .venv/pyvenv.cfg; then
    echo .venv
  else
    echo ".venv-$version"
  fi
}

list_pythons() { # "VERSION PATH" in order, one for each version
  local folder program version folders
  declare -A found=()
  IFS=: read -ra folders <<<"$PATH"
  for folder in "${folders[@]}" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin "${XDG_DATA_HOME:-$HOME/.local/share}"/uv/python/*/bin; do
    for program in "$folder"/python3.{11..19}; do
      [[ -x $program ]] || continue
      version=$(tell_version "$program")
      [[ $version == 0 || -n ${found[$version]:-} ]] || found[$version]=$program
    done
  done
  for version in "${!found[@]}"; do
    echo "$version ${found[$version]}"
  done | sort -V
}

run_tests() {
  local version program venv
  mapfile -t pythons < <(list_pythons)
  ((${#pythons[@]})) || { echo "pythons: no Python from 3.11 on is found" >&2; exit 1; }
  [[ ${1:-} != --newest ]] || pythons=("${pythons[-1]}")
  echo "pythons: $(printf '%s; ' "${pythons[@]}")"
  for each in "${pythons[@]}"; do
    read -r version program <<<"$each"
    venv=$(tell_venv "$program")
    if [[ ${1:-} == --newest && $venv == .venv ]]; then
      echo "pythons: NOT RUN AGAIN: $version is the newest Python here, and the one of .venv"
      return
    fi
    echo "pythons: $("$program" --version) ($program) in $venv"
    make --no-print-directory setup PYTHON="$program"
    "$venv/bin/python" -m pytest -q -n 2 --dist loadfile -p no:cacheprovider "${TESTS[@]}"
  done
}

case ${1:-} in
  test) run_tests "${@:2}" ;;
  venv) tell_venv "$2" ;;
  *)
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac

#!/usr/bin/env bash
# Re-lock the dependencies: pyproject.toml -> uv.lock -> requirements*.txt.
#
#   scripts/lock.sh             keep the pins, add what is new
#   scripts/lock.sh --upgrade   take the newest versions allowed
#
# The committed files name no package index: yours comes from your own pip or uv settings.
# `uv sync` accepts such a lock and keeps its pins.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-.venv/bin/uv}
"$uv" lock --quiet "$@"
"$uv" export --quiet --frozen --no-emit-project --no-dev --extra validator --no-header -o requirements.txt >/dev/null
"$uv" export --quiet --frozen --no-emit-project --all-extras --no-header -o requirements-dev.txt >/dev/null
"$uv" export --quiet --frozen --no-emit-project --only-group bench --no-header -o requirements-bench.txt >/dev/null
sed -i -E \
  -e 's#registry = "https?://[^"]*"#registry = "https://index.invalid/simple"#' \
  -e 's#url = "https?://[^"]*/([^"/]*)"#url = "https://index.invalid/\1"#' uv.lock
if grep -E 'https?://' requirements*.txt; then
  echo "lock: a requirements file names an index; export without it" >&2
  exit 1
fi

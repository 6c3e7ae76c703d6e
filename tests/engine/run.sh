#!/bin/bash
# `make test-engine`: set the engine environment up (once, 3.7 GB) and run the tests against a real vLLM prefill/decode pair on the CPU.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
bash "$root/tests/engine/setup.sh"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
exec "$python" -m pytest -q -s -m engine "$root/tests/engine" "$@"

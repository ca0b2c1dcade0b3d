#!/usr/bin/env bash
# Makes .venv-fusion-bench at the repository root: fusion-bench on the same torch that we are measured on.
# An environment of its own, because fusion-bench's requirements must never bind ours.
# Safe to run again: it does nothing once the environment imports.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-fusion-bench
module=fusion_bench.method.singular_value_calibration
peer='fusion-bench==0.2.33'

usable() {
    [[ -x $venv/bin/python ]] && "$venv/bin/python" -c "import $module" >/dev/null 2>&1
}

if usable; then
    echo "$venv is ready"
    exit 0
fi

"${PYTHON:-python3}" -m venv "$venv"
# torch first, held to our version: whatever else fusion-bench asks for must fit around it.
"$venv/bin/python" -m pip install --quiet -c constraints.txt torch
"$venv/bin/python" -m pip install --quiet -c constraints.txt "$peer"
usable || {
    echo "$venv was installed but fusion-bench does not import:" >&2
    "$venv/bin/python" -c "import $module" >&2
    exit 1
}
"$venv/bin/python" -m pip list 2>/dev/null | grep -iE '^(fusion.bench|torch|transformers|huggingface_hub|safetensors|numpy|lightning) '

#!/usr/bin/env bash
# Makes .venv-mergekit at the repository root: mergekit on the same torch that we are measured on.
# An environment of its own, because mergekit's requirements must never bind ours.
# Safe to run again: it does nothing once the environment imports.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv-mergekit
mergekit='mergekit>=0.1.4,<0.2'

usable() {
    [[ -x $venv/bin/mergekit-yaml ]] &&
        "$venv/bin/python" -c 'import mergekit.scripts.run_yaml' >/dev/null 2>&1
}

if usable; then
    echo "$venv is ready"
    exit 0
fi

"${PYTHON:-python3}" -m venv "$venv"
# torch first, held to our version: whatever else mergekit asks for must fit around it.
"$venv/bin/python" -m pip install --quiet -c constraints.txt torch
"$venv/bin/python" -m pip install --quiet -c constraints.txt "$mergekit"
usable || {
    echo "$venv was installed but mergekit does not import:" >&2
    "$venv/bin/python" -c 'import mergekit.scripts.run_yaml' >&2
    exit 1
}
"$venv/bin/python" -m pip list 2>/dev/null | grep -iE '^(mergekit|torch|transformers|huggingface_hub|pydantic|accelerate|peft|safetensors|numpy|click) '

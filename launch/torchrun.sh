#!/usr/bin/env bash
# Merge with torchrun:  launch/torchrun.sh CONFIG OUT [options of distmerge merge]
#
# RANKS_PER_NODE  how many ranks; if unset one per GPU, or one per core and at most 8 without GPUs
#
# Several nodes: run this on every node, with the same arguments and
#   NODES=4  NODE_RANK=0...3  MASTER_ADDR=host-of-node-0  [MASTER_PORT=29500]
# OUT may lie on a disk that all nodes see or on node 0's own: distmerge finds out.
set -euo pipefail

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || gpus=0
cores=$(nproc)
ranks=${RANKS_PER_NODE:-$((gpus > 0 ? gpus : cores < 8 ? cores : 8))}
export OMP_NUM_THREADS=1 # a rank computes with one thread

if [ "${NODES:-1}" -gt 1 ]; then
    meeting=(--nnodes="$NODES" --node-rank="$NODE_RANK"
        --master-addr="$MASTER_ADDR" --master-port="${MASTER_PORT:-29500}")
else
    meeting=(--standalone) # takes a free port
fi

exec torchrun "${meeting[@]}" --nproc-per-node="$ranks" -m distmerge merge "$@"

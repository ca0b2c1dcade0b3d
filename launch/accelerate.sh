#!/usr/bin/env bash
# Merge with accelerate:  launch/accelerate.sh CONFIG OUT [options of distmerge merge]
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
nodes=${NODES:-1}
export OMP_NUM_THREADS=1 # a rank computes with one thread

meeting=()
if [ $((ranks * nodes)) -gt 1 ]; then
    meeting=(--multi_gpu) # without it accelerate starts one process only; it needs no GPU
fi
if [ "$nodes" -gt 1 ]; then
    meeting+=(--machine_rank="$NODE_RANK" --main_process_ip="$MASTER_ADDR"
        --main_process_port="${MASTER_PORT:-29500}")
else
    meeting+=(--main_process_port=0) # takes a free port
fi

exec accelerate launch "${meeting[@]}" --num_machines="$nodes" --num_processes=$((ranks * nodes)) \
    --num_cpu_threads_per_process=1 --mixed_precision=no --dynamo_backend=no \
    -m distmerge merge "$@"

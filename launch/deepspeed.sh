#!/usr/bin/env bash
# Merge with deepspeed's launcher:  launch/deepspeed.sh CONFIG OUT [options of distmerge merge]
#
# RANKS_PER_NODE  how many ranks; if unset one per GPU, or one per core and at most 8 without GPUs
# MASTER_PORT     29500 unless set; another one where that is taken
#
# Several nodes: add --hostfile=FILE with lines as `node1 slots=8`, and --num_nodes; deepspeed then
# starts the ranks through pdsh and ssh, and takes each node's count from its slots.
# OUT may lie on a disk that all nodes see or on the first node's own: distmerge finds out.
set -euo pipefail

gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || gpus=0
cores=$(nproc)
ranks=${RANKS_PER_NODE:-$((gpus > 0 ? gpus : cores < 8 ? cores : 8))}
export OMP_NUM_THREADS=1 # a rank computes with one thread

exec deepspeed --num_accelerators="$ranks" --master_port="${MASTER_PORT:-29500}" \
    --no_local_rank --module distmerge merge "$@"

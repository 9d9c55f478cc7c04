#!/usr/bin/env bash
# The same command on each of N machines, by hand: ./torchrun.sh NODE_RANK, with 0 on the machine that HEAD names.
# Without torchrun: see `omniloom train --nnodes`, which returns 75 where torchrun returns 1 (docs/clusters.md).
set -euo pipefail
NODES=2
GPUS=8
HEAD=gpu-01:29500        # a name that all machines reach, and a port that is free there
CONFIG=config.yaml       # train.run_dir and the paths of model and data: the same files on all machines
NODE_RANK=${1:?which machine is this, from 0}

# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0   # where a machine has several network interfaces

exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --node-rank "$NODE_RANK" \
    --master-addr "${HEAD%:*}" --master-port "${HEAD##*:}" -m omniloom.cli train "$CONFIG"

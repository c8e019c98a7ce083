#!/usr/bin/env bash
# Train with several processes, one per GPU (on a machine without GPU: one per CPU process, over gloo).
#
#   bash tools/dist_train.sh CONFIG GPUS [OPTIONS OF tools/train.py]
#
# Several nodes: run it on every node with
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=<first node> PORT=29500 bash tools/dist_train.sh CONFIG GPUS
#
# From the environment: NNODES (1), NODE_RANK (0), MASTER_ADDR (127.0.0.1), PORT (one node: a free
# one; several: 29500), PYTHON (python).
set -euo pipefail

if [[ $# -lt 2 ]]; then
    echo "usage: bash tools/dist_train.sh CONFIG GPUS [OPTIONS]" >&2
    exit 2
fi
config=$1
gpus=$2
shift 2

# shellcheck source=tools/launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"
run_torchrun "${gpus}" "${TOOLS_DIR}/train.py" "${config}" --launcher pytorch "$@"

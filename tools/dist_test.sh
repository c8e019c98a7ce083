#!/usr/bin/env bash
# Test a checkpoint with several processes, one per GPU.
#
#   bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [OPTIONS OF tools/test.py]
#
# Several nodes and the environment: as in tools/dist_train.sh.
set -euo pipefail

if [[ $# -lt 3 ]]; then
    echo "usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [OPTIONS]" >&2
    exit 2
fi
config=$1
checkpoint=$2
gpus=$3
shift 3

# shellcheck source=tools/launch_common.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch_common.sh"
run_torchrun "${gpus}" "${TOOLS_DIR}/test.py" "${config}" "${checkpoint}" --launcher pytorch "$@"

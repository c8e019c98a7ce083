#!/usr/bin/env bash
#SBATCH --job-name=linvis
#SBATCH --output=slurm-%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
# Train on a Slurm cluster, one task per GPU.
#
# As a batch job, from the top of the checkout; resources are options of sbatch:
#
#   sbatch --partition=P --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8 \
#       tools/slurm_train.sh CONFIG [OPTIONS OF tools/train.py]
#
# Directly, waiting for the resources:
#
#   PARTITION=P GPUS=16 GPUS_PER_NODE=8 CPUS_PER_TASK=8 \
#       bash tools/slurm_train.sh CONFIG [OPTIONS OF tools/train.py]
#
# From the environment: GPUS (8), GPUS_PER_NODE (8 or GPUS), PARTITION, JOB_NAME, CPUS_PER_TASK,
# PORT, SRUN_ARGS (further options of srun), PYTHON (python), LINVIS_ROOT (the checkout, if sbatch
# is called elsewhere). Two minutes before the time limit training saves a checkpoint and ends; go on
# with the same command and --resume.
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: [sbatch|bash] tools/slurm_train.sh CONFIG [OPTIONS]" >&2
    exit 2
fi
config=$1
shift 1

# sbatch runs a copy of this file in its spool folder: the checkout is then where it was called.
tools=$(dirname "${BASH_SOURCE[0]}")
if [[ ! -f ${tools}/launch_common.sh ]]; then
    tools=${LINVIS_ROOT:-${SLURM_SUBMIT_DIR:-.}}/tools
fi
if [[ ! -f ${tools}/launch_common.sh ]]; then
    echo "${tools}/launch_common.sh does not exist: call sbatch at the top of the checkout," \
        "or set LINVIS_ROOT." >&2
    exit 2
fi
# shellcheck source=tools/launch_common.sh
source "${tools}/launch_common.sh"
run_slurm "${TOOLS_DIR}/train.py" "${config}" "$@"

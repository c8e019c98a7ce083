# Functions of dist_*.sh and slurm_*.sh; to be sourced, not run.
# shellcheck shell=bash

TOOLS_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PROJECT_DIR=$(dirname "${TOOLS_DIR}")
PYTHON=${PYTHON:-python}
export PYTHONPATH="${PROJECT_DIR}:${PROJECT_DIR}/ops${PYTHONPATH:+:${PYTHONPATH}}"

free_port() {
    "${PYTHON}" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# run_torchrun PROCESSES_PER_NODE SCRIPT [ARGUMENTS]
run_torchrun() {
    local processes=$1
    shift
    if ! [[ ${processes} =~ ^[1-9][0-9]*$ ]]; then
        echo "GPUS must be a positive number, got '${processes}'." >&2
        exit 2
    fi
    local nodes=${NNODES:-1}
    local port=${PORT:-}
    # All nodes have to name the same port, so only a single node may pick its own.
    if [[ -z ${port} ]]; then
        if [[ ${nodes} -eq 1 ]]; then port=$(free_port); else port=29500; fi
    fi
    exec "${PYTHON}" -m torch.distributed.run \
        --nnodes="${nodes}" \
        --node_rank="${NODE_RANK:-0}" \
        --master_addr="${MASTER_ADDR:-127.0.0.1}" \
        --master_port="${port}" \
        --nproc_per_node="${processes}" \
        "$@"
}

# run_slurm SCRIPT [ARGUMENTS]: one task per GPU through srun, inside an allocation or by itself.
run_slurm() {
    local script=$1
    shift
    local srun_args=()
    if ! command -v srun >/dev/null; then
        echo "srun is not there: this script is for a Slurm cluster; without one use tools/dist_train.sh or tools/dist_test.sh." >&2
        exit 2
    fi
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        # sbatch or salloc has laid the tasks out; they ask for what the allocation holds.
        local nodes=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}
        local per_node=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}}
        srun_args+=(--nodes="${nodes}" --ntasks="$((nodes * per_node))" --ntasks-per-node="${per_node}")
        local hosts
        hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST}")
        export MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
        # The same on every node, and another one for another job on the same node.
        export MASTER_PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    else
        local gpus=${GPUS:-8}
        local per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
        if ((gpus % per_node != 0)); then
            echo "GPUS (${gpus}) must be a multiple of GPUS_PER_NODE (${per_node})." >&2
            exit 2
        fi
        srun_args+=(--nodes="$((gpus / per_node))" --ntasks="${gpus}" --ntasks-per-node="${per_node}")
        srun_args+=(--gres="gpu:${per_node}" --job-name="${JOB_NAME:-linvis}")
        [[ -n ${PARTITION:-} ]] && srun_args+=(--partition="${PARTITION}")
        # Slurm gives no port: one from a range that other services leave alone.
        export MASTER_PORT=${PORT:-$((20000 + RANDOM % 20000))}
    fi
    local cpus=${CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-}}
    [[ -n ${cpus} ]] && srun_args+=(--cpus-per-task="${cpus}")
    # When one task ends the others get five minutes to save a checkpoint, and do not hang for ever.
    srun_args+=(--kill-on-bad-exit=0 --wait=300)
    # SRUN_ARGS is a list of options in one string.
    local extra=()
    read -r -a extra <<<"${SRUN_ARGS:-}"
    exec srun "${srun_args[@]}" ${extra[@]+"${extra[@]}"} \
        "${PYTHON}" -u "${script}" "$@" --launcher slurm
}

"""Which device and which process of a job this is."""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed

from linvis.engine.errors import LaunchError

_REMEDY = {
    'pytorch': 'start it with tools/dist_train.sh or tools/dist_test.sh',
    'slurm': 'start it with tools/slurm_train.sh or tools/slurm_test.sh',
    'mpi': 'start it with mpirun',
}
# Names of global rank, world size, rank within the node, processes of the node.
_VARIABLES = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_NTASKS_PER_NODE'),
    'mpi': (
        'OMPI_COMM_WORLD_RANK',
        'OMPI_COMM_WORLD_SIZE',
        'OMPI_COMM_WORLD_LOCAL_RANK',
        'OMPI_COMM_WORLD_LOCAL_SIZE',
    ),
}


@dataclass(frozen=True)
class Placement:
    """Where one process runs.

    Attributes:
        device: 'cpu' or 'cuda'.
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.
        rank: Number of this process in the job.
        local_rank: Number of this process on its node.
        world_size: Number of processes of the job.
    """

    device: str
    launcher: str = 'none'
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def backend(self) -> str:
        """What the processes talk through."""
        return 'nccl' if self.device == 'cuda' else 'gloo'


def resolve_placement(
    device: str, launcher: str, environ: Mapping[str, str] | None = None
) -> Placement:
    """Finds device and rank, and says what is missing.

    Args:
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.
        environ: Variables of the launcher; default: those of this process.

    Returns:
        The placement of this process.

    Raises:
        LaunchError: If a GPU is asked for that is not there, if the launcher did not start this
            process, or if Slurm gave it no GPU and the device is 'auto'. A job without GPUs is
            mostly one that did not ask for them, and would train for days on a CPU.
    """
    environ = os.environ if environ is None else environ
    match = re.fullmatch(r'auto|cpu|cuda(?::(\d+))?', device)
    if match is None:
        raise LaunchError(f'--device takes auto, cpu, cuda or cuda:N, got {device}.')
    # The count alone tells too little: a driver that is too old for torch sees GPUs it cannot use.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith('cuda') and count == 0:
        raise LaunchError(
            f'--device {device}: PyTorch {torch.__version__} finds no usable GPU here; '
            'use --device cpu, or install a driver and a PyTorch for CUDA.'
        )
    kind = 'cuda' if device != 'cpu' and count else 'cpu'
    index = match.group(1)
    if launcher == 'none':
        if index is not None:
            if int(index) >= count:
                raise LaunchError(
                    f'--device {device}: this machine has {count} GPU(s), cuda:0 to '
                    f'cuda:{count - 1}.'
                )
            torch.cuda.set_device(int(index))
        return Placement(kind)
    if index is not None:
        raise LaunchError(
            f'--device {device} does not go with --launcher {launcher}, which gives each process '
            'its GPU: use --device cuda.'
        )
    rank, world_size, local_rank, local_size = _ranks(launcher, environ)
    if launcher == 'slurm' and kind == 'cpu' and device != 'cpu':
        raise LaunchError(
            f'--launcher slurm: PyTorch {torch.__version__} finds no usable GPU in this task; ask '
            'for them, e.g. sbatch --gpus-per-node=8 --ntasks-per-node=8, or use --device cpu.'
        )
    if kind == 'cuda' and max(local_rank + 1, local_size) > count:
        raise LaunchError(
            f'The {launcher} launcher starts {max(local_rank + 1, local_size)} processes on a '
            f'machine with {count} GPU(s): start at most {count}, or use --device cpu.'
        )
    return Placement(kind, launcher, rank, local_rank, world_size)


def join_processes(placement: Placement, timeout: float = 1800) -> None:
    """Connects the processes of a job that runs on CPUs.

    On GPUs mmengine connects them itself; on CPUs it would ask for a GPU.

    Args:
        placement: Where this process runs.
        timeout: Seconds after which a silent peer is given up.
    """
    if placement.launcher == 'none' or torch.distributed.is_initialized():
        return
    os.environ.update(
        RANK=str(placement.rank),
        WORLD_SIZE=str(placement.world_size),
        LOCAL_RANK=str(placement.local_rank),
    )
    if placement.device == 'cuda':
        return
    os.environ.setdefault('MASTER_ADDR', _first_host())
    os.environ.setdefault('MASTER_PORT', '29500')
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=timeout))


def _ranks(launcher: str, environ: Mapping[str, str]) -> tuple[int, int, int, int]:
    names = _VARIABLES[launcher]
    missing = [name for name in names[:3] if name not in environ]
    if missing:
        raise LaunchError(
            f'--launcher {launcher}: {missing[0]} is not set, so the launcher did not start this '
            f'process; {_REMEDY[launcher]}.'
        )
    rank, world_size, local_rank = (int(environ[name]) for name in names[:3])
    # Slurm sets its variable only where the number was asked for, and may write 4(x2).
    local_size = re.match(r'\d+', environ.get(names[3], '1'))
    return rank, world_size, local_rank, int(local_size.group()) if local_size else 1


def _first_host() -> str:
    nodes = os.environ.get('SLURM_JOB_NODELIST') or os.environ.get('SLURM_NODELIST')
    if not nodes:
        return '127.0.0.1'
    listed = subprocess.run(
        ['scontrol', 'show', 'hostnames', nodes], capture_output=True, text=True, check=True
    )
    return listed.stdout.split()[0]

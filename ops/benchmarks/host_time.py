"""Measure how long the host is busy with a call of an operator, before and between its kernels.

    python ops/benchmarks/host_time.py
    python ops/benchmarks/host_time.py --op layer_norm q_shift_mix --out host_time.json

Networks in eager mode on small inputs take that long; what a CUDA graph replays does not. Every
operator runs at the first shape of its registry with a batch of one, which leaves the GPU less to
do than the host. Calls follow one another in blocks, without waiting for the GPU; a row has the
median of the blocks and the fastest one, in microseconds a call. PyTorch's own norms stand beside
ours, and `empty_like`, which launches nothing. Exit status: 2 without a GPU.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import command_line, results, run
from benchmarks.passes import Runnable
from benchmarks.registry import Operator, named
from benchmarks.results import Row, shape_text
from benchmarks.rivals import TORCH_LAYER_NORM, TORCH_RMS_NORM

DEVICE = 'cuda'
PASSES = ('fwd', 'fwd+bwd')
CALLS = 20  # of a block: their kernels fit the queue of a GPU
BLOCKS = 100
WARM_UP = 5  # calls, in which kernels are compiled
RIVALS = (TORCH_LAYER_NORM, TORCH_RMS_NORM)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for, print the rows and write them."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = command_line.Parser(
        prog='host_time.py', description='Measure the time of calls on the host.'
    )
    parser.add_argument('--op', nargs='+', default=[], metavar='NAME', help='default: all')
    parser.add_argument('--dtype', choices=run.DTYPES, default='bfloat16')
    parser.add_argument(
        '--blocks', type=command_line.positive, default=BLOCKS, help=f'default: {BLOCKS}'
    )
    parser.add_argument('--commit', help='the commit to record where git cannot tell it')
    parser.add_argument('--out', type=command_line.out_file, help='JSON file for the results')
    args = parser.parse_args(argv)
    try:
        operators = named(args.op)
    except ValueError as error:
        return command_line.complain(f'host_time.py: {error}')
    if not run.has_gpu():
        return command_line.complain(run.NO_GPU)
    command = results.command('ops/benchmarks/host_time.py', argv)
    header = {**results.make_header(run.OPS, command, args.commit), 'cpu': processor()}
    print(json.dumps(header, indent=1))
    rows = []
    for row in measure(operators, args.dtype, args.blocks):
        rows.append(row)
        print(row_text(row), flush=True)
    if args.out:
        args.out.write_text(json.dumps({'header': header, 'rows': rows}, indent=1) + '\n')
        command_line.say_written(args.out)
    return 0


def measure(operators: Sequence[Operator], dtype_name: str, blocks: int) -> Iterator[Row]:
    """Rows of operators, each as it is measured, behind that of a call that launches nothing."""
    dtype = getattr(torch, dtype_name)
    x = torch.empty(1, device=DEVICE, dtype=dtype)
    calls = times(lambda: torch.empty_like(x), blocks)
    yield {'op': 'empty_like', 'impl': 'torch', 'pass': 'fwd', 'dtype': dtype_name,
           'shape': {}, **summary(calls)}  # fmt: skip
    for operator in operators:
        shape = {**operator.shape(operator.shapes[0]), 'B': 1}
        runnables: dict[str, Runnable] = {'auto': operator.prepare(shape, dtype, DEVICE, 'auto')}
        for rival in operator.rivals:
            if rival in RIVALS:
                traffic = operator.bytes_by_pass(shape, dtype)
                runnables[rival.name] = rival.prepare(shape, dtype, DEVICE, traffic)
        for impl, runnable in runnables.items():
            for pass_name in PASSES:
                calls = times(runnable.call(pass_name).run, blocks)
                yield {'op': operator.name, 'impl': impl, 'pass': pass_name, 'dtype': dtype_name,
                       'shape': shape, **summary(calls)}  # fmt: skip


def times(call: Callable[[], object], blocks: int) -> list[float]:
    """Microseconds of the host for a call, on average over each block."""
    for _ in range(WARM_UP):
        call()
    samples = []
    for _ in range(blocks):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        samples.append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return samples


def summary(samples: Sequence[float]) -> dict[str, float | int]:
    """What a row says of its blocks."""
    return {
        'us': round(statistics.median(samples), 2),
        'us_least': round(min(samples), 2),
        'calls': len(samples) * CALLS,
    }


def row_text(row: Row) -> str:
    """A row as one line."""
    return (
        f'{row["op"]:26} {row["impl"]:17} {row["pass"]:8} {row["dtype"]:9} '
        f'{shape_text(row["shape"]):34} {row["us"]:8.1f} us (least {row["us_least"]:.1f})'
    )


def processor() -> str:
    """Name of the CPU, as far as the system tells it."""
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor()


if __name__ == '__main__':
    sys.exit(main())

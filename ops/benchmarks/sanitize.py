"""Run every kernel under compute-sanitizer, for accesses out of bounds, races, unwritten memory.

    python ops/benchmarks/sanitize.py
    python ops/benchmarks/sanitize.py --op bi_wkv --tool racecheck

Each backend of an operator that can run on this GPU runs forward and backward, at small sizes. What
kernels do for inputs out of range is not reached. racecheck looks at shared memory only.

Exit status: 0 if nothing was found, 1 if something was, 2 if nothing can run.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import linvis_ops
from benchmarks import run
from benchmarks.command_line import Parser, complain, no_gpu
from benchmarks.passes import Function
from benchmarks.registry import Operator, named

TOOLS = ('memcheck', 'racecheck', 'initcheck')
# One sequence that is short enough for one launch and one that is not; 196 tokens are those for
# which the authors' kernel of Bi-WKV reads out of bounds.
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    'bi_wkv': ((2, 196, 192), (1, 1000, 40), (1, 1000, 30), (1, 8200, 32)),
    'bi_gla': ((2, 196, 2, 32, 64), (1, 600, 2, 32, 64)),
    'q_shift': ((2, 14, 14, 192),),
    'q_shift_mix': ((2, 14, 14, 192),),
    'q_shift_mix_norm': ((2, 14, 14, 192),),
    'rms_norm': ((3, 50, 32),),
    'layer_norm': ((3, 50, 96), (1, 300, 400), (2, 3000, 96)),
    'retention': ((2, 197, 2, 64, 64), (1, 600, 2, 64, 64)),
    'retention_2d_causal': ((1, 14, 14, 2, 64, 64), (1, 37, 40, 1, 64, 64)),
    'retention_2d_bidirectional': ((1, 14, 14, 2, 64, 64), (1, 37, 40, 1, 64, 64)),
}
# Class tokens, heads and channels of the operators that shift, beside those shapes.
SHIFTS = ((1, 1, 192), (0, 4, 192), (1, 2, 30))
KERNELS = ('triton', 'cuda')
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen operators under the chosen tools."""
    args = parser().parse_args(argv)
    if not run.has_gpu():
        return complain(no_gpu('Kernels run under compute-sanitizer'))
    if args.here:
        return 0 if launch(args.op) else complain('No kernels of these operators can run here.')
    if shutil.which('compute-sanitizer') is None:
        return complain('compute-sanitizer is not on the PATH; it comes with the CUDA toolkit.')
    itself = [sys.executable, __file__, '--here', '--op', *args.op]
    # what is compiled here is found in the cache under the tools, which slow it down
    if subprocess.run(itself, check=False).returncode:
        return complain('The operators do not run, even without compute-sanitizer.')
    found = 0
    for tool in args.tool:
        print(f'== {tool}', flush=True)
        command = ['compute-sanitizer', '--tool', tool, '--error-exitcode', '3', *itself]
        # a block of memory for each tensor, so that what lies beyond it is not another tensor
        environment = {**os.environ, 'PYTORCH_NO_CUDA_MEMORY_CACHING': '1'}
        found |= subprocess.run(command, env=environment, check=False).returncode
    return int(found != 0)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = Parser(prog='sanitize.py', description=__doc__.split('\n')[0])
    command.add_argument('--op', nargs='+', choices=SHAPES, default=list(SHAPES))
    command.add_argument('--tool', nargs='+', choices=TOOLS, default=list(TOOLS))
    command.add_argument('--here', action='store_true', help='run the kernels in this process')
    return command


def launch(names: Sequence[str]) -> int:
    """Run both passes of all kernels of some operators; returns how many backends could."""
    count = 0
    for operator in named(names):
        backends = linvis_ops.available_backends(operator.function)
        for backend in (name for name in KERNELS if name in backends):
            if backends[backend] is not None:
                print(f'{operator.name} {backend}: left out, since {backends[backend]}', flush=True)
                continue
            count += 1
            for sizes in SHAPES[operator.name]:
                for dtype in DTYPES:
                    shape = dict(zip(operator.axes, sizes, strict=True))
                    operator.prepare(shape, dtype, 'cuda', backend).call('fwd+bwd').run()
                    torch.cuda.synchronize()
                    print(operator.name, backend, sizes, dtype, flush=True)
            for shift, dtype in itertools.product(SHIFTS, DTYPES):
                if operator.function.startswith('q_shift'):
                    shifted(operator, *shift, dtype, 'cuda', backend).call('fwd+bwd').run()
                    torch.cuda.synchronize()
                    print(operator.name, backend, 'class tokens, heads, channels:', *shift, dtype)
    return count


def shifted(
    operator: Operator,
    class_tokens: int,
    heads: int,
    channels: int,
    dtype: torch.dtype,
    device: str,
    backend: str,
) -> Function:
    """An operator that shifts, on a small grid with class tokens and heads."""
    shape = {'B': 2, 'rows': 7, 'columns': 9, 'C': channels}
    _, *weights = operator.inputs(shape, dtype, device)
    x = torch.randn(2, 7 * 9 + class_tokens, channels, dtype=dtype, device=device)
    inputs = (x.requires_grad_(), *weights)
    function = getattr(linvis_ops, operator.function)
    arguments, options = operator.arguments(inputs, shape), operator.options(inputs)
    return Function(lambda: function(*arguments, **options, heads=heads, backend=backend), inputs)


if __name__ == '__main__':
    sys.exit(main())

"""Find the launch rules of Bi-WKV's Triton kernels that suit a GPU.

    python ops/benchmarks/tune.py --out tuned.json
    python ops/benchmarks/tune.py --pass fwd --shape 16x4096x192 --repeats 20

From the rule in use, one field after the other is given each of its candidates, and the fastest is
kept: the geometric mean over the shapes counts, so that no shape is sacrificed. Every trial is
printed. The result is printed as Python for TUNED in ops/linvis_ops/bi_wkv/launch.py, for somebody
to read and to commit; nothing is changed by itself. Exit status: 2 without a GPU.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import command_line, run
from benchmarks.measure import Selection
from benchmarks.registry import named
from benchmarks.timing import CudaTimer, Timer
from linvis_ops.bi_wkv.launch import Launch, Pass, Rule, launch_for, rules_of
from linvis_ops.testing import bi_wkv_inputs

# Fields in the order in which they are settled; those of one tuple are tried together.
CANDIDATES: tuple[tuple[tuple[str, ...], tuple[tuple[int, ...], ...]], ...] = (
    (
        ('channels', 'per_thread', 'length'),
        ((32, 1, 8), (32, 1, 16), (64, 1, 8), (64, 1, 16), (64, 2, 8), (128, 2, 8), (128, 2, 16)),
    ),
    (('programs',), ((4,), (8,), (12,), (16,), (24,), (32,))),
    (('most_blocks',), ((4,), (8,), (16,), (32,))),
    (('group_above', 'group'), ((8, 8), (16, 8), (24, 8), (32, 16), (64, 16))),
    (('at_once',), ((2,), (4,), (8,))),
)
Trial = Callable[[Rule], float]


def main(argv: Sequence[str] | None = None) -> int:
    """Tune the passes that the command line asks for."""
    parser = command_line.Parser(
        prog='tune.py', description='Find launch rules of Bi-WKV for this GPU.'
    )
    parser.add_argument('--pass', dest='passes', nargs='+', choices=('fwd', 'bwd'))
    parser.add_argument('--shape', nargs='+', type=command_line.sizes, default=[], metavar='BxTxC')
    parser.add_argument('--dtype', choices=run.DTYPES, default='bfloat16')
    parser.add_argument('--repeats', type=command_line.positive, default=20)
    parser.add_argument('--out', type=command_line.out_file, help='JSON file of all trials')
    args = parser.parse_args(argv)
    selection = Selection(named(['bi_wkv']), args.shape)
    try:
        selection.check()
    except ValueError as error:
        return command_line.complain(f'tune.py: {error}')
    if not run.has_gpu():
        return command_line.complain(run.NO_GPU)
    shapes = args.shape or selection.operators[0].shapes
    trials: list[dict] = []
    with CudaTimer() as timer:
        for of in cast(list[Pass], args.passes or ['fwd', 'bwd']):
            calls = [Call(shape, getattr(torch, args.dtype), of, timer.device) for shape in shapes]

            def trial(rule: Rule, of: Pass = of, calls: Sequence[Call] = calls) -> float:
                times = [time_of(call, rule, timer, args.repeats) for call in calls]
                score = math.exp(sum(map(math.log, times)) / len(times))
                names = ('x'.join(map(str, call.shape)) for call in calls)
                trials.append(
                    {
                        'pass': of,
                        **dataclasses.asdict(rule),
                        # JSON has no infinity
                        'ms': {
                            name: time if math.isfinite(time) else None
                            for name, time in zip(names, times, strict=True)
                        },
                        'mean': score if math.isfinite(score) else None,
                    }
                )
                print(f'{of} {score * 1e3:8.1f} us  {rule}', flush=True)
                if args.out:
                    args.out.write_text(json.dumps(trials, indent=1) + '\n')
                return score

            best = search(calls[0].rule(), trial)
            capability = torch.cuda.get_device_capability() if timer.device == 'cuda' else None
            print(f'best for {capability}: {of!r}: {best}', flush=True)
    if args.out:
        command_line.say_written(args.out)
    return 0


def search(rule: Rule, trial: Trial) -> Rule:
    """The best rule found by changing a field, or a few that belong together, at a time."""
    best, score = rule, trial(rule)
    for fields, choices in CANDIDATES:
        start = best
        for values in choices:
            candidate = dataclasses.replace(start, **dict(zip(fields, values, strict=True)))
            if candidate == start:
                continue
            found = trial(candidate)
            if found < score:
                best, score = candidate, found
    return best


class Call:
    """Bi-WKV in one pass on inputs of one shape."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, of: Pass, device: str) -> None:
        self.shape = shape
        self.of = of
        batch, tokens, channels = shape
        w, u, k, v = bi_wkv_inputs(batch, tokens, channels, dtype, device)
        self.inputs = w.detach(), u.detach(), k.detach(), v.detach()
        self.gy = torch.randn_like(self.inputs[3])

    def rule(self) -> Rule:
        """The rule in use on this device."""
        rules, _ = rules_of(self.gy.device)
        return rules[self.of]

    def __call__(self, launch: Launch) -> object:
        """Run the pass, divided in this way."""
        from linvis_ops.bi_wkv import kernels_triton, kernels_triton_backward

        if self.of == 'fwd':
            return kernels_triton.bi_wkv_forward(*self.inputs, launch)
        return kernels_triton_backward.bi_wkv_backward(self.gy, *self.inputs, launch)


def time_of(call: Call, rule: Rule, timer: Timer, repeats: int) -> float:
    """Median in ms; infinite where the kernel does not fit the GPU."""
    from triton.runtime.errors import OutOfResources

    launch = launch_for(call.gy, call.of, rule)
    try:
        return timer.times(lambda: call(launch), repeats).quantile(0.5)
    except OutOfResources:
        return math.inf


if __name__ == '__main__':
    sys.exit(main())

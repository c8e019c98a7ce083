"""Measure what one VRWKV block costs on a GPU, beside its matrix products and its least traffic.

    python tools/analysis/block_cost.py --arch tiny --shape 224x256 1024x16 --out block_cost.json

A shape is PIXELSxBATCH. The block is a layer of the network, as it is built for an arch, in two
precisions: `autocast` (float32 weights and residual stream under bfloat16 autocast, as networks are
trained) and `bfloat16` (weights and stream in bfloat16, the least traffic of inference). It runs
eager and compiled, each as it is launched and in a CUDA graph. Beside stands what no implementation
can avoid: the products of its linear layers, each measured alone, and the least traffic of all
other steps at the speed of a copy in the same run. docs/models/vrwkv.md says which steps these
are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from linvis.models import VRWKV
from linvis.models.backbones.vrwkv import HIDDEN_RATE
from linvis.models.layers import MixerBlock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'ops'))

from benchmarks import command_line, results
from benchmarks import run as harness
from benchmarks.passes import Function
from benchmarks.timing import CudaTimer, Run, Timing

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = command_line.no_gpu('The cost of a block is measured')
ARCHS = ('tiny', 'small', 'base')
PRECISIONS = ('autocast', 'bfloat16')
PASSES = ('fwd', 'fwd+bwd')
LAYER = 1  # the first layer has one norm more than all others
PATCH = 16  # pixels
HALF = 2  # bytes of what lies between two products
REPEATS = 100
PROFILED_CALLS = 5
# Kernels by name, the first pattern that is found in it; compiled ones are named after what was
# fused, operators of ours included, and come first for that reason.
GROUPS = (
    ('products', re.compile(r'^triton_tem_|gemm|nvjet|cutlass|cublas|xmma|splitk', re.I)),
    ('layer norm', re.compile(r'layer_?norm|gammabeta', re.I)),
    ('elementwise', re.compile(r'^triton_poi_|elementwise_kernel', re.I)),
    ('other', re.compile(r'^triton_(red|per|for)_')),
    ('bi_wkv', re.compile(r'bi_wkv')),
    ('q_shift_mix', re.compile(r'q_shift')),
    ('other', re.compile('')),
)


class BlockTimer(CudaTimer):
    """Times calls in a CUDA graph, and as they are launched one kernel after another."""

    _graphs = True

    def launched(self, run: Run, repeats: int) -> Timing:
        """Time a call without a graph: what the host needs longer than the GPU counts."""
        self._graphs = False
        try:
            return self.times(run, repeats)
        finally:
            self._graphs = True

    def _capture(self, run: Run) -> tuple[torch.cuda.CUDAGraph | None, str | None]:
        return super()._capture(run) if self._graphs else (None, 'launched')


class Product(NamedTuple):
    """A matrix product of a linear layer: its output, or a gradient in the backward pass."""

    kind: str  # output, gradient of the input or gradient of the weight
    tokens: int
    inputs: int
    outputs: int

    def call(self, device: str) -> Run:
        """The product in bfloat16, on operands that lie as in the network."""

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)

        if self.kind == 'output':
            x, weight = matrix(self.tokens, self.inputs), matrix(self.outputs, self.inputs)
            return lambda: torch.mm(x, weight.t())
        grad = matrix(self.tokens, self.outputs)
        if self.kind == 'gradient of the input':
            weight = matrix(self.outputs, self.inputs)
            return lambda: torch.mm(grad, weight)
        x = matrix(self.tokens, self.inputs)
        return lambda: torch.mm(grad.t(), x)


def channels_of(block: MixerBlock) -> int:
    """Channels C of a token."""
    return block.ln1.weight.numel()


def products(block: nn.Module, tokens: int, pass_name: str) -> Counter[Product]:
    """The matrix products of a pass, each with how often it occurs.

    Args:
        block: Its linear layers count.
        tokens: B * T.
        pass_name: 'fwd' or 'fwd+bwd'.
    """
    kinds = ['output']
    if pass_name == 'fwd+bwd':
        kinds += ['gradient of the input', 'gradient of the weight']
    linear = [module for module in block.modules() if isinstance(module, nn.Linear)]
    return Counter(
        Product(kind, tokens, one.in_features, one.out_features) for one in linear for kind in kinds
    )


def least_traffic(block: MixerBlock, tokens: int, stream: int, pass_name: str) -> dict[str, int]:
    """Bytes that the steps other than matrix products have to read and write, by step.

    Each step reads its inputs once and writes its outputs once; parameters and statistics of norms
    are left out. What lies between two products has 2 bytes a number.

    Args:
        block: A block of VRWKV.
        tokens: B * T.
        stream: Bytes of a number of the residual stream.
        pass_name: 'fwd' or 'fwd+bwd'.
    """
    plain_residual = block.gamma1 is None and not block.post_norm
    steps = {
        'norm, shift, three mixes': stream + 3 * HALF,
        'bi_wkv': 3 * HALF,
        'receptance gate': 3 * HALF,
        'layer scale, residual': 2 * stream + HALF,
        'norm, shift, two mixes': stream + 2 * HALF,
        'squared ReLU, key norm': 2 * HALF * HIDDEN_RATE,
        'receptance gate, layer scale, residual': 2 * stream + 2 * HALF,
    }
    if pass_name == 'fwd+bwd':
        # the gradient of the branch is that of the stream, in 16 bits
        branch = (stream + HALF) * (stream != HALF) if plain_residual else stream + 2 * HALF
        steps |= {
            'backward: receptance gate, layer scale, residual': stream + 4 * HALF,
            'backward: squared ReLU, key norm': 3 * HALF * HIDDEN_RATE,
            'backward: norm, shift, two mixes': 3 * stream + 2 * HALF,
            'backward: layer scale, residual': branch,
            'backward: receptance gate': 5 * HALF,
            'backward: bi_wkv': 5 * HALF,
            'backward: norm, shift, three mixes': 3 * stream + 3 * HALF,
        }
    elements = tokens * channels_of(block)
    return {step: size * elements for step, size in steps.items()}


def group_of(kernel: str) -> str:
    """The group that a kernel counts to, by its name."""
    return next(group for group, pattern in GROUPS if pattern.search(kernel))


class Case(NamedTuple):
    """One block with its input, and a pass over it."""

    arch: str
    pixels: int
    batch: int
    precision: str
    pass_name: str

    def block(self, device: str) -> MixerBlock:
        """The block, on a device."""
        block = cast(MixerBlock, VRWKV(self.arch).layers[LAYER]).to(device)
        return block.bfloat16() if self.precision == 'bfloat16' else block

    @property
    def side(self) -> int:
        """Rows, and columns, of tokens."""
        return -(-self.pixels // PATCH)

    @property
    def stream(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return torch.bfloat16 if self.precision == 'bfloat16' else torch.float32

    def call(self, block: MixerBlock, compiling: dict[str, Any] | None, device: str) -> Run:
        """The pass, eager or compiled.

        Args:
            block: What `block` returns.
            compiling: Arguments of torch.compile, or None for eager.
            device: Of the block.
        """
        size = (self.batch, self.side**2, channels_of(block))
        x = torch.randn(size, device=device, dtype=self.stream)
        module: Callable[..., Tensor] = block
        if compiling is not None:
            module = torch.compile(block, fullgraph=True, dynamic=False, **compiling)

        def forward() -> Tensor:
            enabled = self.precision == 'autocast'
            with torch.autocast(device, torch.bfloat16, enabled=enabled):
                return module(x, (self.side, self.side))

        inputs = (x.requires_grad_(), *block.parameters())
        return Function(forward, inputs).call(self.pass_name).run


def profiled(run: Run) -> list[dict[str, Any]]:
    """Kernels of a call with their group and milliseconds, the longest first."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_CALLS):
            run()
        torch.cuda.synchronize()
    kernels = [
        {
            'kernel': event.key,
            'group': group_of(event.key),
            'calls': event.count / PROFILED_CALLS,
            'ms': round(event.self_device_time_total / 1e3 / PROFILED_CALLS, 5),
        }
        for event in profiler.key_averages()
        # regions that PyTorch names, such as a compiled graph, are no kernels
        if event.device_type.name == 'CUDA' and not event.is_user_annotation
    ]
    return sorted(kernels, key=lambda kernel: -kernel['ms'])


def by_group(kernels: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of the kernels of each group, the longest first."""
    sums: Counter[str] = Counter()
    for kernel in kernels:
        sums[kernel['group']] += kernel['ms']
    return {group: round(ms, 5) for group, ms in sums.most_common()}


class Measurement:
    """Measures cases, and keeps what it found.

    Args:
        timer: Measures a call.
        copy_gb_s: Speed of a copy in this run.
        ways: Arguments of torch.compile by name of the way to run; None is eager.
        repeats: Most repetitions of a call.
    """

    def __init__(
        self,
        timer: BlockTimer,
        copy_gb_s: float,
        ways: dict[str, dict[str, Any] | None],
        repeats: int,
    ) -> None:
        self.timer = timer
        self.copy_gb_s = copy_gb_s
        self.ways = ways
        self.repeats = repeats
        self.cases: list[dict[str, Any]] = []
        self._product_ms: dict[Product, float] = {}

    def measure(self, case: Case) -> dict[str, Any]:
        """All that is to be known of a case; it is also appended to `cases`."""
        block = case.block(self.timer.device)
        tokens = case.batch * case.side**2
        counted = products(block, tokens, case.pass_name)
        products_ms = sum(count * self._alone(one) for one, count in counted.items())
        traffic = least_traffic(block, tokens, case.stream.itemsize, case.pass_name)
        memory_ms = sum(traffic.values()) / self.copy_gb_s / 1e6
        entry = {
            **case._asdict(),
            'tokens': case.side**2,
            'channels': channels_of(block),
            'products_ms': round(products_ms, 5),
            'products': [
                {**one._asdict(), 'count': count, 'ms': round(self._alone(one), 5)}
                for one, count in counted.items()
            ],
            'memory_ms': round(memory_ms, 5),
            'least_bytes': traffic,
            'least_ms': round(products_ms + memory_ms, 5),
            'rows': [],
            'kernels': {},
            'left_out': {},
        }
        self.cases.append(entry)
        for way, compiling in self.ways.items():
            try:
                self._measure_way(entry, way, case.call(block, compiling, self.timer.device))
            except torch.OutOfMemoryError:
                entry['left_out'][way] = 'it does not fit into memory'
            torch.compiler.reset()  # every shape is compiled for itself, and none too many
            self.timer.release()
        return entry

    def _alone(self, product: Product) -> float:
        """Milliseconds of a product alone."""
        if product not in self._product_ms:
            timing = self.timer.times(product.call(self.timer.device), self.repeats)
            self._product_ms[product] = timing.quantile(0.5)
            self.timer.release()
        return self._product_ms[product]

    def _measure_way(self, entry: dict[str, Any], way: str, run: Run) -> None:
        for timing in (
            self.timer.launched(run, self.repeats),
            self.timer.times(run, self.repeats),
        ):
            milliseconds = timing.quantile(0.5)
            entry['rows'].append(
                {
                    'way': way,
                    'graph': timing.graph,
                    'ms': round(milliseconds, 5),
                    'ms_10': round(timing.quantile(0.1), 5),
                    'ms_90': round(timing.quantile(0.9), 5),
                    'repeats': len(timing.samples),
                    'ratio': round(milliseconds / entry['least_ms'], 3),
                    'note': timing.note,
                }
            )
        entry['kernels'][way] = profiled(run)


def text_of(entry: dict[str, Any]) -> str:
    """A case as a table, with the time of each group of kernels."""
    gigabytes = sum(entry['least_bytes'].values()) / 1e9
    lines = [
        f'{entry["arch"]}, {entry["batch"]} x {entry["tokens"]} tokens, {entry["channels"]} '
        f'channels, {entry["precision"]}, {entry["pass_name"]}: products '
        f'{entry["products_ms"]:.4f} ms + least memory {entry["memory_ms"]:.4f} ms '
        f'({gigabytes:.3f} GB) = {entry["least_ms"]:.4f} ms'
    ]
    for row in entry['rows']:
        how = 'in a graph' if row['graph'] else row['note']
        lines.append(f'  {row["way"]:14} {how:12} {row["ms"]:9.4f} ms  x {row["ratio"]:.2f}')
    for way, kernels in entry['kernels'].items():
        groups = [f'{group} {ms:.4f}' for group, ms in by_group(kernels).items()]
        calls = sum(kernel['calls'] for kernel in kernels)
        lines.append(f'  {way:14} {calls:.0f} kernels, ms: {", ".join(groups) or "none seen"}')
    lines += [f'  {way:14} left out: {why}' for way, why in entry['left_out'].items()]
    return '\n'.join(lines)


def shape(text: str) -> tuple[int, int]:
    """(pixels, batch) of a text PIXELSxBATCH."""
    sizes = command_line.sizes(text)
    if len(sizes) != 2:
        raise argparse.ArgumentTypeError(f'expected PIXELSxBATCH, such as 224x256, got {text!r}')
    return sizes[0], sizes[1]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.Parser(
        description=__doc__.split('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--arch', nargs='+', default=['tiny'], choices=ARCHS, help='archs of VRWKV')
    parser.add_argument(
        '--shape',
        nargs='+',
        type=shape,
        default=[(224, 256), (1024, 16)],
        metavar='PIXELSxBATCH',
        help='picture size and batch',
    )
    parser.add_argument('--precision', nargs='+', default=PRECISIONS, choices=PRECISIONS)
    parser.add_argument(
        '--pass', nargs='+', default=PASSES, choices=PASSES, dest='passes', help='what is timed'
    )
    parser.add_argument(
        '--max-autotune',
        action='store_true',
        help='also compile in the mode max-autotune-no-cudagraphs, which takes minutes',
    )
    parser.add_argument(
        '--repeats', type=command_line.positive, default=REPEATS, help='most repetitions of a call'
    )
    parser.add_argument('--commit', help='commit that is measured, where git is not there to say')
    parser.add_argument('--out', type=command_line.out_file, help='JSON file for everything')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case that the command line asks for."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse_arguments(argv)
    if not harness.has_gpu():
        return command_line.complain(NO_GPU)
    ways: dict[str, dict[str, Any] | None] = {'eager': None, 'compiled': {}}
    if args.max_autotune:
        ways['max-autotune'] = {'mode': 'max-autotune-no-cudagraphs'}
    timer = BlockTimer()
    with timer:
        measured = harness.yardsticks(timer, args.repeats, torch.cuda.mem_get_info()[0])
        command = results.command('tools/analysis/block_cost.py', argv)
        header = results.make_header(
            ROOT / 'ops', command, args.commit, **measured, flush_mib=timer.flush_bytes / 2**20
        )
        if args.commit is None:
            status = results.git(ROOT, 'status', '--porcelain', '--', 'linvis', 'ops/linvis_ops')
            header['dirty'] = None if status is None else bool(status)
        print(json.dumps(header, indent=1))
        measurement = Measurement(timer, measured['copy_gb_s'], ways, args.repeats)
        for (pixels, batch), *names in itertools.product(
            args.shape, args.arch, args.precision, args.passes
        ):
            arch, precision, pass_name = names
            entry = measurement.measure(Case(arch, pixels, batch, precision, pass_name))
            print(text_of(entry), flush=True)
            if args.out:  # a run that is stopped keeps what it has
                found = {'header': header, 'cases': measurement.cases}
                args.out.write_text(json.dumps(found, indent=1) + '\n')
    if args.out:
        command_line.say_written(args.out)
    return 0


if __name__ == '__main__':
    sys.exit(main())

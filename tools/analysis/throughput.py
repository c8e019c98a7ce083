"""Measure pictures a second and peak memory of backbones on a GPU, beside networks of timm.

    python tools/analysis/throughput.py --network vrwkv-tiny vig-tiny \
        --rival deit_tiny_patch16_224 --shape 224x256 512x64 --out throughput.json

A shape is PIXELSxBATCH. Every network runs under bfloat16 autocast, eager and compiled, in
inference and in training (forward and backward), and each of these in two ways: its kernels
launched by the host one after another, which takes the host's time where that is longer, and
captured in a CUDA graph, which is replayed and takes the GPU's time alone. A figure is the median
over the runs of a fixed time; peak memory is what PyTorch had allocated at most, weights included.
Exit status: 0, 1 if a network of ours failed, 2 if nothing can be measured.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linvis.models import VRWKV, HybridViR, ViG, ViGHierarchical, ViR

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'ops'))

from benchmarks import command_line, results

OPS = Path(results.__file__).parents[1]
FAMILIES = {
    'vrwkv': VRWKV,
    'vig': ViG,
    'vig-h': ViGHierarchical,
    'vir': ViR,
    'vir-hybrid': HybridViR,
}
# Backbones by the names that their configs begin with.
NETWORKS = {
    f'{family}-{arch}': (backbone, arch)
    for family, backbone in FAMILIES.items()
    for arch in backbone.archs
}
MODES = ('inference', 'train')
FORMS = ('eager', 'compiled')
LAUNCHES = ('host', 'graph')
WARM_UP = 3  # runs before a capture, in which everything is compiled and tuned


def shape(text: str) -> tuple[int, int]:
    """(pixels, batch) of a text PIXELSxBATCH."""
    pixels, cross, batch = text.partition('x')
    if not (cross and pixels.isdecimal() and batch.isdecimal() and int(pixels) and int(batch)):
        raise argparse.ArgumentTypeError(f'expected PIXELSxBATCH, such as 224x256, got {text!r}')
    return int(pixels), int(batch)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.Parser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--network',
        nargs='*',
        default=['vrwkv-tiny'],
        choices=NETWORKS,
        metavar='NAME',
        help=f'one or more of {", ".join(NETWORKS)}',
    )
    parser.add_argument('--rival', nargs='*', default=[], help='names of timm networks')
    parser.add_argument(
        '--shape', nargs='+', type=shape, default=[(224, 256)], metavar='PIXELSxBATCH'
    )
    parser.add_argument('--mode', nargs='+', choices=MODES, default=MODES)
    parser.add_argument('--form', nargs='+', choices=FORMS, default=FORMS)
    parser.add_argument(
        '--launch',
        nargs='+',
        choices=LAUNCHES,
        default=LAUNCHES,
        help='kernels launched one after another by the host, or replayed as a CUDA graph',
    )
    parser.add_argument('--commit', help='commit that is measured, where git is not there to say')
    parser.add_argument('--out', type=command_line.out_file, help='JSON file for the rows')
    args = parser.parse_args()
    if not (args.network or args.rival):
        parser.error('there is nothing to measure without names after --network or --rival')
    if args.rival and importlib.util.find_spec('timm') is None:
        parser.error('--rival needs timm: pip install timm')
    return args


def build(name: str, pixels: int) -> nn.Module:
    """A backbone of ours, or else a network of timm without its head, on the GPU."""
    if name in NETWORKS:
        backbone, arch = NETWORKS[name]
        settings: dict[str, Any] = {'img_size': pixels} if backbone in (VRWKV, ViG, ViR) else {}
        return backbone(arch=arch, out_type='avg_featmap', **settings).cuda()
    import timm

    kwargs = {'img_size': pixels} if 'vit' in name or 'deit' in name else {}
    return timm.create_model(name, num_classes=0, **kwargs).cuda()


def runner(model: nn.Module, x: torch.Tensor, train: bool) -> Callable[[], Any]:
    """A function that runs the network once."""

    def total() -> torch.Tensor:
        with torch.autocast('cuda', dtype=torch.bfloat16):
            y = model(x)
        return (y[0] if isinstance(y, tuple) else y).float().sum()

    def step() -> None:
        total().backward()
        for parameter in model.parameters():
            parameter.grad = None

    def inference() -> None:
        with torch.inference_mode():
            total()

    return step if train else inference


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """A function that replays a run as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def measure(
    name: str, pixels: int, batch: int, mode: str, form: str, launches: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows of one network at one shape, one for each way of launching its kernels.

    `failed` in a row says why there are no figures.
    """
    from triton.testing import do_bench  # only where there is a GPU is triton certain

    train = mode == 'train'
    about = {'network': name, 'mode': mode, 'form': form, 'pixels': pixels, 'batch': batch}
    rows: list[dict[str, Any]] = []
    torch.compiler.reset()
    torch.cuda.empty_cache()
    try:
        model = build(name, pixels).train(train)
        if form == 'compiled':
            model.compile(fullgraph=True)
        run = runner(model, torch.randn(batch, 3, pixels, pixels, device='cuda'), train)
        run()
        for launch in launches:
            torch.cuda.reset_peak_memory_stats()
            timed = captured(run) if launch == 'graph' else run
            milliseconds = do_bench(timed, warmup=100, rep=600, return_mode='median')
            figures = {
                'ms': round(milliseconds, 3),
                'images_s': round(batch / milliseconds * 1e3, 1),
                'peak_mib': round(torch.cuda.max_memory_allocated() / 2**20),
            }
            rows.append({**about, 'launch': launch, **figures})
    except RuntimeError as error:  # out of memory, or what a compiler or a capture cannot do
        reason = f'{type(error).__name__}: {str(error).splitlines()[0]}'
        rows += [{**about, 'launch': launch, 'failed': reason} for launch in launches[len(rows) :]]
    return rows


def header_of(command: str, commit: str | None, device: str = 'cuda') -> dict[str, Any]:
    """What is written on top of the rows: the machine, the versions and the command.

    Args:
        command: What was typed.
        commit: Commit that is measured; None: as git says.
        device: Where it is measured; of a CPU only the versions are told.
    """
    if torch.device(device).type == 'cuda':
        return results.make_header(OPS, command, commit)
    return {'gpu': None, 'torch': torch.__version__, 'commit': commit, 'command': command}


def write(out: Path, header: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write what was measured as JSON."""
    out.write_text(json.dumps({'header': header, 'rows': rows}, indent=1) + '\n')


def main() -> int:
    """Measure every network at every shape."""
    args = parse_arguments()
    if not torch.cuda.is_available():
        return command_line.complain(command_line.no_gpu('Throughput is measured'))
    command = results.command('tools/analysis/throughput.py', sys.argv[1:])
    header = header_of(command, args.commit)
    rows: list[dict[str, Any]] = []
    for pixels, batch in args.shape:
        for name in (*args.network, *args.rival):
            for form in args.form:
                for mode in args.mode:
                    measured = measure(name, pixels, batch, mode, form, args.launch)
                    rows += measured
                    print(*measured, sep='\n', flush=True)
                    if args.out:  # a run that is stopped keeps what it has
                        write(args.out, header, rows)
    if args.out:
        command_line.say_written(args.out)
    return int(any('failed' in row and row['network'] in NETWORKS for row in rows))


if __name__ == '__main__':
    sys.exit(main())

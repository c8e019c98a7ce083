"""Measure pictures a second and peak memory of backbones on a GPU, beside networks of timm.

    python tools/analysis/throughput.py --network vrwkv-tiny vig-tiny \
        --rival deit_tiny_patch16_224 --shape 224x256 512x64 --out throughput.json

A shape is PIXELSxBATCH. Every network runs under bfloat16 autocast, eager and compiled, in
inference and in training (forward and backward). A figure is the median over the runs of a fixed
time; peak memory is what PyTorch had allocated at most, weights included. Exit status: 0, 1 if
a network of ours failed, 2 if nothing can be measured.
"""

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linvis.models import VRWKV, HybridViR, ViG, ViGHierarchical, ViR

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'ops'))

from benchmarks import results

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


def shape(text: str) -> tuple[int, int]:
    """(pixels, batch) of a text PIXELSxBATCH."""
    pixels, cross, batch = text.partition('x')
    if not (cross and pixels.isdecimal() and batch.isdecimal() and int(pixels) and int(batch)):
        raise argparse.ArgumentTypeError(f'expected PIXELSxBATCH, such as 224x256, got {text!r}')
    return int(pixels), int(batch)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
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
    parser.add_argument('--commit', help='commit that is measured, where git is not there to say')
    parser.add_argument('--out', type=Path, help='JSON file for the rows')
    return parser.parse_args()


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


def measure(name: str, pixels: int, batch: int, mode: str, form: str) -> dict[str, Any]:
    """The row of one network at one shape; `failed` in it says why there are no figures."""
    from triton.testing import do_bench  # only where there is a GPU is triton certain

    train = mode == 'train'
    row: dict[str, Any] = {
        'network': name,
        'mode': mode,
        'form': form,
        'pixels': pixels,
        'batch': batch,
    }
    torch.compiler.reset()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        model = build(name, pixels).train(train)
        if form == 'compiled':
            model.compile(fullgraph=True)
        run = runner(model, torch.randn(batch, 3, pixels, pixels, device='cuda'), train)
        run()
        milliseconds = do_bench(run, warmup=100, rep=600, return_mode='median')
    except RuntimeError as error:  # out of memory, or what a compiler cannot do
        return {**row, 'failed': f'{type(error).__name__}: {str(error).splitlines()[0]}'}
    return {
        **row,
        'ms': round(milliseconds, 3),
        'images_s': round(batch / milliseconds * 1e3, 1),
        'peak_mib': round(torch.cuda.max_memory_allocated() / 2**20),
    }


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
        print('Throughput is measured on an NVIDIA GPU, and PyTorch finds none.', file=sys.stderr)
        return 2
    if args.rival and importlib.util.find_spec('timm') is None:
        print('--rival needs timm: pip install timm.', file=sys.stderr)
        return 2
    command = f'python {shlex.join(["tools/analysis/throughput.py", *sys.argv[1:]])}'
    header = header_of(command, args.commit)
    rows: list[dict[str, Any]] = []
    for pixels, batch in args.shape:
        for name in (*args.network, *args.rival):
            for form in args.form:
                for mode in args.mode:
                    rows.append(measure(name, pixels, batch, mode, form))
                    print(rows[-1], flush=True)
                    if args.out:  # a run that is stopped keeps what it has
                        write(args.out, header, rows)
    return int(any('failed' in row and row['network'] in NETWORKS for row in rows))


if __name__ == '__main__':
    sys.exit(main())

"""Measure pictures a second and peak memory of backbones on a GPU, beside networks of timm.

    python tools/analysis/throughput.py --arch tiny small --rival deit_tiny_patch16_224 \
        --shape 224x256 512x64 --out throughput.json

A shape is PIXELSxBATCH. Every network runs under bfloat16 autocast, eager and compiled, in
inference and in training (forward and backward). A figure is the median over the runs of a fixed
time.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linvis.models import VRWKV


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
        '--arch', nargs='*', default=['tiny'], choices=sorted(VRWKV.archs), help='archs of VRWKV'
    )
    parser.add_argument('--rival', nargs='*', default=[], help='names of timm networks')
    parser.add_argument(
        '--shape', nargs='+', type=shape, default=[(224, 256)], metavar='PIXELSxBATCH'
    )
    parser.add_argument('--eager-only', action='store_true', help='do not compile')
    parser.add_argument('--out', help='JSON file for the rows')
    return parser.parse_args()


def build(kind: str, name: str, pixels: int) -> nn.Module:
    """A backbone of ours ('linvis') or of timm, on the GPU."""
    if kind == 'linvis':
        return VRWKV(arch=name, img_size=pixels, out_type='avg_featmap').cuda()
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


def measure(kind: str, name: str, pixels: int, batch: int, compiled: bool) -> list[dict[str, Any]]:
    """Rows of one network at one shape."""
    from triton.testing import do_bench  # only where there is a GPU is triton certain

    rows = []
    for train in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model: nn.Module = build(kind, name, pixels).train(train)
        if compiled:
            model = torch.compile(model, fullgraph=True)
        run = runner(model, torch.randn(batch, 3, pixels, pixels, device='cuda'), train)
        run()
        milliseconds = do_bench(run, warmup=100, rep=600, return_mode='median')
        rows.append(
            {
                'network': f'{kind} {name}',
                'mode': 'train' if train else 'inference',
                'compiled': compiled,
                'pixels': pixels,
                'batch': batch,
                'ms': round(milliseconds, 3),
                'images_s': round(batch / milliseconds * 1e3, 1),
                'peak_mib': round(torch.cuda.max_memory_allocated() / 2**20),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> int:
    """Measure every network at every shape."""
    args = parse_arguments()
    if not torch.cuda.is_available():
        print('Throughput is measured on an NVIDIA GPU, and PyTorch finds none.', file=sys.stderr)
        return 1
    if args.rival and importlib.util.find_spec('timm') is None:
        print('--rival needs timm: pip install timm.', file=sys.stderr)
        return 1
    networks = [('linvis', name) for name in args.arch] + [('timm', name) for name in args.rival]
    rows = []
    for pixels, batch in args.shape:
        for kind, name in networks:
            for compiled in (False,) if args.eager_only else (False, True):
                rows += measure(kind, name, pixels, batch, compiled)
    if args.out:
        header = {
            'gpu': torch.cuda.get_device_name(),
            'torch': torch.__version__,
            'triton': importlib.metadata.version('triton'),
            'python': platform.python_version(),
        }
        Path(args.out).write_text(json.dumps({**header, 'rows': rows}, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    sys.exit(main())

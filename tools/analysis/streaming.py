"""Measure ViR in all its forms on tall pictures: time, peak memory, and whether the forms agree.

    python tools/analysis/streaming.py --height 1024 4096 16384 65536 --out streaming.json

The forms compute the same features with the same weights:

* `parallel`: the definition, all pairs of tokens at once; memory grows with the square of height.
* `chunkwise`: `backbone(picture)`, with the operator's fastest backend; memory grows with height.
* `stream`: `backbone.stream`, --band rows of patches at a time; memory is that of a band.
* `recurrent`: the same with one row of patches at a time, which is the recurrence over the rows.

The picture is noise, bytes in the memory of the host, and goes to the device as a whole or band by
band. A time goes from those bytes to the last feature; it is the median of the runs of one second,
or one run where that takes longer. Peak memory is what PyTorch had allocated on the GPU at most,
weights included; on a CPU it is not measured. Weights are random and layer scales 1, so that the
operator counts in the features; these have a norm behind them and are of the order of 1. A
difference is the largest absolute one from the parallel form in float32. TF32 is off.

A form that fails at one height, for want of memory, is not tried at the greater ones. Exit status:
0, or 1 if a streamed form failed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from linvis.models import ViR
from linvis.models.layers.retention import DECAYS, Retention

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.analysis import throughput

STREAMED = ('stream', 'recurrent')
FORMS = (*STREAMED, 'chunkwise', 'parallel')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
HEIGHTS = [1024 * 2**step for step in range(7)]
SECONDS = 1.0  # of runs, of which a median is taken


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--arch', choices=ViR.archs, default='small')
    parser.add_argument('--retention', choices=DECAYS, default='2d')
    parser.add_argument('--form', nargs='+', choices=FORMS, default=FORMS)
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=['float32', 'bfloat16'])
    parser.add_argument('--width', type=int, default=1024, help='of the pictures, in pixels')
    parser.add_argument('--height', nargs='+', type=int, default=HEIGHTS, metavar='PIXELS')
    parser.add_argument('--band', type=int, default=16, help='rows of patches in a band')
    parser.add_argument(
        '--parallel-height',
        type=int,
        default=4096,
        metavar='PIXELS',
        help='the highest picture for the parallel form',
    )
    parser.add_argument(
        '--compare-height',
        type=int,
        default=2048,
        metavar='PIXELS',
        help='the highest picture whose features are compared; 0: none',
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--commit', help='commit that is measured, where git is not there to say')
    parser.add_argument('--out', type=Path, help='JSON file for the rows')
    args = parser.parse_args()
    if min(args.width, args.band, *args.height) < 1:
        parser.error('--width, --height and --band must be at least 1')
    args.height.sort()
    return args


def build(arch: str, retention: str, device: str) -> ViR:
    """A causal backbone of random weights, the same for every call."""
    torch.manual_seed(0)
    return ViR(arch, retention=retention, layer_scale_init=1.0).to(device).eval()


def features(model: ViR, picture: Tensor, form: str, band: int) -> Iterator[Tensor]:
    """Maps (1, C, rows, columns) of a picture in one of the forms, band by band where it streams.

    Args:
        model: Causal backbone.
        picture: Bytes (3, H, W), in the memory of the host.
        form: One of `FORMS`.
        band: Rows of patches at a time with 'stream'.
    """
    weight = model.cls_token

    def pixels(part: Tensor) -> Tensor:
        return part[None].to(weight.device).to(weight.dtype).div_(127.5).sub_(1)

    for module in model.modules():
        if isinstance(module, Retention):
            module.backend = 'reference' if form == 'parallel' else 'auto'
    if form in STREAMED:
        rows = model.patch_size * (band if form == 'stream' else 1)
        bands = (pixels(part) for part in picture.split(rows, dim=1))
        for (part,) in model.stream(bands, picture.shape[1]):
            yield part
    else:
        with torch.inference_mode():
            yield model(pixels(picture))[0]


def exhaust(parts: Iterator[Tensor]) -> None:
    """Take all parts and keep none."""
    for part in parts:
        del part


def compared(model: ViR, picture: Tensor, form: str, band: int, reference: Tensor) -> float:
    """The largest absolute difference of the features of a form from those of the reference."""
    first, largest = 0, 0.0
    for part in features(model, picture, form, band):
        other = reference[:, :, first : first + part.shape[2]].to(part.device)
        largest = max(largest, (part.float() - other).abs().max().item())
        first += part.shape[2]
    return largest


def measure(
    model: ViR, picture: Tensor, form: str, band: int, reference: Tensor | None, *, warm: bool
) -> dict[str, Any]:
    """The row of one form at one height; `failed` in it says why there are no figures.

    Args:
        model: Causal backbone, in the dtype that is measured.
        picture: Bytes (3, H, W), in the memory of the host.
        form: One of `FORMS`.
        band: Rows of patches at a time with 'stream'.
        reference: Features to compare with, in float32; None: they are not compared.
        warm: Whether this form has run in this dtype: kernels are compiled, libraries loaded.
    """
    height, width = picture.shape[1:]
    on_gpu = model.cls_token.is_cuda
    row: dict[str, Any] = {
        'form': form,
        'dtype': str(model.cls_token.dtype).removeprefix('torch.'),
        'height': height,
        'width': width,
        'band': {'stream': band, 'recurrent': 1}.get(form),
    }
    milliseconds: list[float] = []
    failed = None
    try:
        if not warm:
            exhaust(features(model, picture, form, band))
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        while not milliseconds or sum(milliseconds) < SECONDS * 1e3:
            start = time.perf_counter()
            exhaust(features(model, picture, form, band))
            if on_gpu:
                torch.cuda.synchronize()
            milliseconds.append((time.perf_counter() - start) * 1e3)
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        if reference is not None:
            row['difference'] = compared(model, picture, form, band, reference)
    except RuntimeError as error:  # out of memory
        failed = f'{type(error).__name__}: {str(error).splitlines()[0]}'
    if failed is not None:
        return {**row, 'failed': failed}
    row['ms'] = round(median(milliseconds), 3)
    row['images_s'] = float(f'{1e3 / row["ms"]:.4g}')
    if peak is not None:
        row['peak_mib'] = round(peak / 2**20, 1)
    return row


def line_of(row: dict[str, Any]) -> str:
    """A row as a line of the table."""
    start = f'{row["form"]:10} {row["dtype"]:9} {row["width"]:>6} x {row["height"]:<7}'
    if 'failed' in row:
        return f'{start} {row["failed"]}'
    peak = f'{row["peak_mib"]:.1f}' if 'peak_mib' in row else '-'
    difference = f'{row["difference"]:.1e}' if 'difference' in row else '-'
    return f'{start} {row["ms"]:12.2f} {row["images_s"]:10.4g} {peak:>10} {difference:>10}'


def growth(rows: Sequence[dict[str, Any]], form: str, dtype: str) -> str | None:
    """How the peak memory of a form depends on the height, in one line; None without figures."""
    mine = [row for row in rows if (row['form'], row['dtype']) == (form, dtype)]
    peaks = [row['peak_mib'] for row in mine if 'peak_mib' in row]
    if not peaks:
        return None
    return (
        f'{form} in {dtype}: peak memory {min(peaks):.1f} to {max(peaks):.1f} MiB, '
        f'{max(peaks) / min(peaks) - 1:+.1%}'
    )


def make_references(args: argparse.Namespace, picture: Tensor) -> dict[int, Tensor]:
    """Features by the parallel form in float32, by height, on the host."""
    model = build(args.arch, args.retention, args.device)
    references = {}
    for height in args.height:
        if height > min(args.compare_height, args.parallel_height):
            break
        try:
            (maps,) = features(model, picture[:, :height], 'parallel', args.band)
        except RuntimeError as error:  # out of memory
            reason = str(error).splitlines()[0]
            print(f'Not compared from a height of {height} on: {reason}', file=sys.stderr)
            break
        references[height] = maps.cpu()
    return references


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print every form at every height."""
    torch.backends.cudnn.allow_tf32 = False  # the default of matrix products already
    command = f'python {shlex.join(["tools/analysis/streaming.py", *sys.argv[1:]])}'
    header = throughput.header_of(command, args.commit, args.device)
    generator = torch.Generator().manual_seed(0)
    size = 3, args.height[-1], args.width
    picture = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    references = make_references(args, picture)
    print(
        f'{"form":10} {"dtype":9} {"picture":16} {"ms":>13} {"pictures/s":>10} {"peak MiB":>10} '
        f'{"difference":>10}'
    )
    rows: list[dict[str, Any]] = []
    for dtype in args.dtype:
        model = build(args.arch, args.retention, args.device).to(DTYPES[dtype])
        for form in args.form:
            warm = False
            for height in args.height:
                if form == 'parallel' and height > args.parallel_height:
                    break
                part, reference = picture[:, :height], references.get(height)
                rows.append(measure(model, part, form, args.band, reference, warm=warm))
                warm = True
                print(line_of(rows[-1]), flush=True)
                if args.out:  # a run that is stopped keeps what it has
                    throughput.write(args.out, header, rows)
                if 'failed' in rows[-1]:
                    break
        del model
    return rows


def main() -> int:
    """Measure, and say how memory depends on the height."""
    args = parse_arguments()
    rows = run(args)
    for dtype in args.dtype:
        for form in args.form:
            line = growth(rows, form, dtype)
            if line is not None:
                print(line)
    return int(any('failed' in row and row['form'] in STREAMED for row in rows))


if __name__ == '__main__':
    sys.exit(main())

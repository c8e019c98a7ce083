"""Measure ViR in all its forms on tall pictures: time, peak memory, and whether the forms agree.

    python tools/analysis/streaming.py --height 1024 4096 16384 65536 --out streaming.json

The forms compute the same features with the same weights:

* `parallel`: the definition, all pairs of tokens at once; memory grows with the square of height.
* `chunkwise`: `backbone(picture)`, with the operator's fastest backend; memory grows with height.
* `stream`: `backbone.stream`, --band rows of patches at a time, with the same backend and matrix
  products of PyTorch for the states; memory is that of a band.
* `recurrent`: the same with one row of patches at a time, which is the recurrence over the rows.

The kernels of these two are launched one after another by the host or, from the third band on, as a
CUDA graph; --launch chooses.

The picture is noise, bytes in the memory of the host, and goes to the device as a whole or band by
band. A time goes from those bytes to the last feature; it is the median of the runs of one second,
or one run where that takes longer. Peak memory is what PyTorch had allocated on the GPU at most,
weights included, and held memory what it had of the GPU, with what it keeps for later and for the
graph; on a CPU they are not measured. Weights are random and layer scales 1, so that the
operator counts in the features; these have a norm behind them and are of the order of 1. A
difference is the largest absolute one from the parallel form in float32. TF32 is off.

A form that fails at one height, for want of memory, is not tried at the greater ones. A terminal
shows what is being measured, drawn once a second by a thread of this process: send stderr to a file
where that may count. Exit status: 0, 1 if a streamed form failed, 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn
from torch import Tensor

from linvis.engine.devices import resolve_placement
from linvis.engine.errors import LaunchError
from linvis.models import ViR
from linvis.models.layers.retention import DECAYS, Retention
from linvis_ops import BackendUnavailableError, available_backends, default_backend

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'ops'))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import command_line, results
from tools.analysis import throughput

STREAMED = ('stream', 'recurrent')
FORMS = (*STREAMED, 'chunkwise', 'parallel')
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
BAND = 32
HEIGHTS = [1024 * 2**step for step in range(7)]
SECONDS = 1.0  # of runs, of which a median is taken


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.Parser(description=__doc__.split('\n')[0])
    parser.add_argument('--arch', choices=ViR.archs, default='small')
    parser.add_argument('--retention', choices=DECAYS, default='2d')
    parser.add_argument('--form', nargs='+', choices=FORMS, default=FORMS)
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=['float32', 'bfloat16'])
    parser.add_argument(
        '--width', type=command_line.positive, default=1024, help='of the pictures, in pixels'
    )
    parser.add_argument(
        '--height', nargs='+', type=command_line.positive, default=HEIGHTS, metavar='PIXELS'
    )
    parser.add_argument(
        '--band',
        nargs='+',
        type=command_line.positive,
        default=[BAND],
        metavar='ROWS',
        help=f'rows of patches in a band (default: {BAND})',
    )
    parser.add_argument(
        '--launch',
        nargs='+',
        choices=throughput.LAUNCHES,
        help='how the kernels of a band are launched (default: both on a GPU, by the host on a '
        'CPU)',
    )
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
    parser.add_argument(
        '--device', default='auto', help='auto (a GPU if there is one), cpu, cuda, cuda:N'
    )
    parser.add_argument('--commit', help='commit that is measured, where git is not there to say')
    parser.add_argument('--out', type=command_line.out_file, help='JSON file for the rows')
    args = parser.parse_args()
    try:
        args.device = resolve_placement(args.device, 'none').device
        args.backend = backend_on(args.device)
    except (LaunchError, BackendUnavailableError) as error:
        parser.error(str(error).rstrip('.'))
    on_cpu = args.device == 'cpu'
    if on_cpu and 'graph' in (args.launch or ()):
        parser.error('--launch graph needs a CUDA GPU, and --device is cpu')
    args.launch = args.launch or (['host'] if on_cpu else throughput.LAUNCHES)
    args.height.sort()
    return args


class Way(NamedTuple):
    """A form, and how it is run.

    Attributes:
        form: One of `FORMS`.
        launch: 'host', or 'graph' for a streamed form.
        band: Rows of patches at a time, of a streamed form.
    """

    form: str
    launch: str = 'host'
    band: int | None = None


def ways_of(args: argparse.Namespace) -> list[Way]:
    """What is measured at each height."""
    bands = {'stream': args.band, 'recurrent': [1]}
    ways = [
        Way(form, launch, band)
        for form in args.form
        for launch in (args.launch if form in STREAMED else ['host'])
        for band in bands.get(form, [None])
    ]
    # graphs last: PyTorch keeps a workspace of theirs, which would count in what follows
    return sorted(ways, key=lambda way: way.launch == 'graph')


def backend_on(device: str) -> str:
    """The backend of retention on a device, and why those before it do not run."""
    chosen = default_backend('retention')
    reasons = available_backends('retention', torch.empty(1, device=device))
    if reasons[chosen] is not None:  # a GPU is there, and the device is the CPU
        chosen = next(name for name, reason in reasons.items() if reason is None)
    before = list(reasons)[: list(reasons).index(chosen)]
    others = [f'no {name}: {reasons[name]}' for name in before if reasons[name]]
    return f'{chosen} ({"; ".join(others)})' if others else chosen


def place_of(args: argparse.Namespace) -> str:
    """What runs on what, in one line."""
    if args.device == 'cpu':
        device = f'the CPU, {torch.get_num_threads()} thread(s)'
    else:
        device = torch.cuda.get_device_name(args.device)
    parts = [f'{form} by {backend_of(form, args.backend)}' for form in args.form]
    return f'Runs on {device}. Retention: {", ".join(parts)}.'


def backend_of(form: str, backend: str) -> str:
    """What retention runs by in one of the forms, where the fastest is `backend`."""
    if form == 'parallel':
        return 'reference'
    return f'{backend}, states by products of PyTorch' if form in STREAMED else backend


def build(arch: str, retention: str, device: str) -> ViR:
    """A causal backbone of random weights, the same for every call."""
    torch.manual_seed(0)
    return ViR(arch, retention=retention, layer_scale_init=1.0).to(device).eval()


def features(model: ViR, picture: Tensor, way: Way) -> Iterator[Tensor]:
    """Maps (1, C, rows, columns) of a picture in one of the forms, band by band where it streams.

    Args:
        model: Causal backbone.
        picture: Bytes (3, H, W), in the memory of the host.
        way: The form, and how it is run.
    """
    weight = model.cls_token

    def pixels(part: Tensor) -> Tensor:
        return part[None].to(weight.device).to(weight.dtype).div_(127.5).sub_(1)

    for module in model.modules():
        if isinstance(module, Retention):
            module.backend = 'reference' if way.form == 'parallel' else 'auto'
    if way.band is not None:
        bands = (pixels(part) for part in picture.split(model.patch_size * way.band, dim=1))
        graph = way.launch == 'graph'
        for (part,) in model.stream(bands, picture.shape[1], cuda_graph=graph):
            yield part
    else:
        with torch.inference_mode():
            yield model(pixels(picture))[0]


def exhaust(parts: Iterator[Tensor]) -> None:
    """Take all parts and keep none."""
    for part in parts:
        del part


def compared(model: ViR, picture: Tensor, way: Way, reference: Tensor) -> float:
    """The largest absolute difference of the features of a form from those of the reference."""
    first, largest = 0, 0.0
    for part in features(model, picture, way):
        other = reference[:, :, first : first + part.shape[2]].to(part.device)
        largest = max(largest, (part.float() - other).abs().max().item())
        first += part.shape[2]
    return largest


def measure(
    model: ViR, picture: Tensor, way: Way, reference: Tensor | None, *, warm: bool
) -> dict[str, Any]:
    """The row of one form at one height; `failed` in it says why there are no figures.

    Args:
        model: Causal backbone, in the dtype that is measured.
        picture: Bytes (3, H, W), in the memory of the host.
        way: The form, and how it is run.
        reference: Features to compare with, in float32; None: they are not compared.
        warm: Whether this has run in this dtype: kernels are compiled, libraries loaded.
    """
    height, width = picture.shape[1:]
    on_gpu = model.cls_token.is_cuda
    row: dict[str, Any] = {
        **way._asdict(),
        'dtype': str(model.cls_token.dtype).removeprefix('torch.'),
        'height': height,
        'width': width,
    }
    milliseconds: list[float] = []
    failed = None
    try:
        if not warm:
            exhaust(features(model, picture, way))
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        while not milliseconds or sum(milliseconds) < SECONDS * 1e3:
            start = time.perf_counter()
            exhaust(features(model, picture, way))
            if on_gpu:
                torch.cuda.synchronize()
            milliseconds.append((time.perf_counter() - start) * 1e3)
        held = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        if reference is not None:
            row['difference'] = compared(model, picture, way, reference)
    except RuntimeError as error:  # out of memory
        failed = f'{type(error).__name__}: {str(error).splitlines()[0]}'
    if failed is not None:
        return {**row, 'failed': failed}
    row['ms'] = round(median(milliseconds), 3)
    row['images_s'] = float(f'{1e3 / row["ms"]:.4g}')
    if on_gpu:
        row |= {n: round(x / 2**20, 1) for n, x in zip(('peak_mib', 'held_mib'), held, strict=True)}
    return row


def name_of(way: Way) -> str:
    """A form and how it is run, in a few letters."""
    if way.band is None:
        return way.form
    return f'{way.form} {way.band} {way.launch}'


def line_of(row: dict[str, Any]) -> str:
    """A row as a line of the table."""
    way = name_of(Way(row['form'], row['launch'], row['band']))
    start = f'{way:18} {row["dtype"]:9} {row["width"]:>6} x {row["height"]:<7}'
    if 'failed' in row:
        return f'{start} {row["failed"]}'
    memory = ' '.join(f'{row.get(name, "-"):>10}' for name in ('peak_mib', 'held_mib'))
    difference = f'{row["difference"]:.1e}' if 'difference' in row else '-'
    return f'{start} {row["ms"]:12.2f} {row["images_s"]:10.4g} {memory} {difference:>10}'


def growth(rows: Sequence[dict[str, Any]], way: Way, dtype: str) -> str | None:
    """How the memory of a form depends on the height, in one line; None without figures."""
    mine = [row for row in rows if row.items() >= {**way._asdict(), 'dtype': dtype}.items()]
    parts = []
    for what, name in (('peak', 'peak_mib'), ('held', 'held_mib')):
        sizes = [row[name] for row in mine if name in row]
        if sizes:
            change = max(sizes) / min(sizes) - 1
            parts.append(f'{what} memory {min(sizes):.1f} to {max(sizes):.1f} MiB, {change:+.1%}')
    return f'{name_of(way)} in {dtype}: {"; ".join(parts)}' if parts else None


def make_references(args: argparse.Namespace, picture: Tensor, bar: Bar) -> dict[int, Tensor]:
    """Features by the parallel form in float32, by height, on the host."""
    model = build(args.arch, args.retention, args.device)
    references: dict[int, Tensor] = {}
    for height in compared_heights(args):
        bar.show(f'parallel float32 {args.width} x {height}, to compare with')
        try:
            (maps,) = features(model, picture[:, :height], Way('parallel'))
        except RuntimeError as error:  # out of memory
            reason = str(error).splitlines()[0]
            print(f'Not compared from a height of {height} on: {reason}', file=sys.stderr)
            bar.advance(len(compared_heights(args)) - len(references))
            break
        references[height] = maps.cpu()
        bar.advance(1)
    return references


def compared_heights(args: argparse.Namespace) -> list[int]:
    """Heights at which features are compared."""
    return [h for h in args.height if h <= min(args.compare_height, args.parallel_height)]


def heights_of(args: argparse.Namespace, form: str) -> list[int]:
    """Heights at which a form is measured."""
    if form != 'parallel':
        return args.height
    return [height for height in args.height if height <= args.parallel_height]


class Bar:
    """What is being measured, and how many measurements are done: on a terminal, else nothing."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        self.progress = Progress(
            SpinnerColumn(),
            '{task.description}',
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=1,
            transient=True,
            redirect_stdout=False,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task('', total=total)

    def show(self, what: str) -> None:
        """Say what is measured from now on."""
        self.progress.update(self.task, description=what, refresh=True)

    def print(self, line: str) -> None:
        """Write a line to stdout, above the bar where that is the same terminal."""
        if sys.stdout.isatty() and not self.progress.disable:
            self.progress.console.print(line, soft_wrap=True, markup=False, highlight=False)
        else:
            print(line, flush=True)

    def advance(self, count: int) -> None:
        """Count measurements that are done, or will not be."""
        self.progress.advance(self.task, count)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print every form at every height."""
    torch.backends.cudnn.allow_tf32 = False  # the default of matrix products already
    command = results.command('tools/analysis/streaming.py', sys.argv[1:])
    header = throughput.header_of(command, args.commit, args.device)
    generator = torch.Generator().manual_seed(0)
    size = 3, args.height[-1], args.width
    picture = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    ways = ways_of(args)
    count = sum(len(heights_of(args, way.form)) for way in ways) * len(args.dtype)
    bar = Bar(count + len(compared_heights(args)))
    rows: list[dict[str, Any]] = []
    with bar.progress:
        references = make_references(args, picture, bar)
        bar.print(
            f'{"form":18} {"dtype":9} {"picture":16} {"ms":>13} {"pictures/s":>10} '
            f'{"peak MiB":>10} {"held MiB":>10} {"difference":>10}'
        )
        for dtype in args.dtype:
            model = build(args.arch, args.retention, args.device).to(DTYPES[dtype])
            for way in ways:
                heights = heights_of(args, way.form)
                for number, height in enumerate(heights):
                    bar.show(f'{name_of(way)} {dtype} {args.width} x {height}')
                    part, reference = picture[:, :height], references.get(height)
                    warm = number > 0
                    rows.append(measure(model, part, way, reference, warm=warm))
                    bar.print(line_of(rows[-1]))
                    if args.out:  # a run that is stopped keeps what it has
                        throughput.write(args.out, header, rows)
                    if 'failed' in rows[-1]:
                        bar.advance(len(heights) - number)
                        break
                    bar.advance(1)
            del model
    return rows


def main() -> int:
    """Measure, and say how memory depends on the height."""
    args = parse_arguments()
    print(place_of(args), flush=True)
    rows = run(args)
    for dtype in args.dtype:
        for way in ways_of(args):
            line = growth(rows, way, dtype)
            if line is not None:
                print(line)
    if args.out and rows:
        command_line.say_written(args.out)
    return int(any('failed' in row and row['form'] in STREAMED for row in rows))


if __name__ == '__main__':
    sys.exit(main())

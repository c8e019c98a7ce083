"""Command lines of tools/train.py, tools/test.py and tools/stream.py.

Only the standard library is imported at the top: `--device cpu` has to hide the GPUs before
mmengine, which looks for them once at import, is loaded.
"""

import argparse
import os
import sys
from collections.abc import Sequence

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file (.py, .yaml or .json)')
    parser.add_argument(
        '--work-dir',
        help='folder of logs and checkpoints; default: work_dirs/<name of the config>',
    )
    parser.add_argument(
        '--device',
        default='auto',
        help='auto (a GPU if there is one), cpu, cuda, or cuda:N without launcher',
    )
    _add_cfg_options(parser)
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, help=argparse.SUPPRESS)
    return parser


def _add_cfg_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        default=[],
        metavar='KEY=VALUE',
        help='settings that replace those of the config, e.g. train_cfg.max_epochs=3; '
        'lists as key=[a,b]; quote brackets and write no spaces',
    )


def train_parser() -> argparse.ArgumentParser:
    """Returns the parser of tools/train.py."""
    parser = _parser('Train a classifier, detector or segmentor.')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='go on from this checkpoint; without PATH from the latest in the work folder',
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision (GPU)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by batch size / auto_scale_lr.base_batch_size',
    )
    return parser


def test_parser() -> argparse.ArgumentParser:
    """Returns the parser of tools/test.py."""
    parser = _parser('Test a classifier, detector or segmentor.')
    parser.add_argument(
        'checkpoint', help="checkpoint file, or 'none' for the weights that training starts from"
    )
    parser.add_argument('--show-dir', help='folder for pictures with predictions drawn in')
    parser.add_argument(
        '--out', help='.pkl: the predictions; .json: the metrics, one number a name'
    )
    return parser


def stream_parser() -> argparse.ArgumentParser:
    """Returns the parser of tools/stream.py."""
    parser = argparse.ArgumentParser(
        description='Classify or segment a very large picture in bands of rows, with a causal ViR.'
    )
    parser.add_argument('config', help='config file of a classifier or segmentor')
    parser.add_argument('checkpoint', help="checkpoint file, or 'none' for random weights")
    parser.add_argument('picture', help='picture file, or .npy of bytes (H, W, 3) in RGB')
    parser.add_argument(
        '--band', type=int, default=32, help='rows of patches in a band; default: 32'
    )
    parser.add_argument(
        '--out',
        help='PNG file of the label map of a segmentor, bytes that number its classes; '
        'default: PICTURE_labels.png in the current folder',
    )
    parser.add_argument(
        '--device', default='auto', help='auto (a GPU if there is one), cpu, cuda, cuda:N'
    )
    _add_cfg_options(parser)
    parser.set_defaults(launcher='none', local_rank=None)
    return parser


def main_train(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says and returns the exit status."""
    return _main(train_parser(), 'train', argv)


def main_test(argv: Sequence[str] | None = None) -> int:
    """Tests as the command line says and returns the exit status."""
    return _main(test_parser(), 'test', argv)


def main_stream(argv: Sequence[str] | None = None) -> int:
    """Streams a picture as the command line says and returns the exit status."""
    return _main(stream_parser(), 'stream', argv)


def _main(parser: argparse.ArgumentParser, task: str, argv: Sequence[str] | None) -> int:
    args = parser.parse_args(argv)
    if 'OMP_WAIT_POLICY' not in os.environ:
        # Threads of PyTorch that wait on a CPU spin for microseconds, then sleep: spinning for
        # longer, they stall one another where the cores are shared. Read when torch is imported.
        os.environ.setdefault('GOMP_SPINCOUNT', '1000')
    if args.device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
    if args.local_rank is not None:
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))

    from linvis.engine import launch
    from linvis.engine.errors import user_sentence

    try:
        if task == 'train':
            launch.train(args)
        elif task == 'test':
            launch.test(args)
        else:
            from linvis.engine.stream import stream

            stream(args)
    except KeyboardInterrupt:
        sys.stderr.write(f'{parser.prog}: stopped; nothing was saved.\n')
        return 130
    except Exception as error:
        sentence = user_sentence(error, task)
        if sentence is None:
            raise
        rank = os.environ.get('RANK', os.environ.get('SLURM_PROCID'))
        where = '' if args.launcher == 'none' or rank is None else f'[rank {rank}] '
        sys.stderr.write(f'{parser.prog}: {where}{sentence}\n')
        return 1
    finally:
        launch.close_process_group()
    return 0

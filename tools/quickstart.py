"""Trains and tests the three tasks on data/mini: python tools/quickstart.py [--help].

Every step is a call of tools/train.py or tools/test.py, whose whole output is in a log file. What
a run has finished, the next one takes over; an interrupted training goes on where it stopped.
Beside a GPU the tasks run at the same time: networks this small leave it idle most of the time.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
BACKBONES = ('vrwkv', 'vig', 'vig-h', 'vir', 'vir-hybrid')
HIERARCHICAL = ('vig-h', 'vir-hybrid')
STEPS = {
    'before': 'testing the untrained network',
    'train': 'training',
    'after': 'testing the trained network',
    'curves': 'drawing the curves',
}


@dataclass(frozen=True)
class Task:
    """What is run for a task.

    Attributes:
        configs: Paths of the configs from the root of the project, by backbone.
        metrics: Names in the result file to names in the table.
        tests: What the metrics are measured on, each with the options for tools/test.py that
            choose it; the predictions on the first are drawn.
        factor: From the result file's numbers to per cent.
    """

    configs: dict[str, str]
    metrics: dict[str, str]
    tests: dict[str, tuple[str, ...]]
    factor: float = 1.0


def configs(detail: str, recipe: str, plain: str = '', hierarchical: str = '') -> dict[str, str]:
    """Returns the path of a config for each backbone; the last two name the necks of both kinds."""
    return {
        backbone: f'configs/quickstart/{detail}{backbone}-micro'
        f'{hierarchical if backbone in HIERARCHICAL else plain}_{recipe}.py'
        for backbone in BACKBONES
    }


TASKS = {
    'classification': Task(
        configs=configs('', '1xb32-400i_mini-cls-96px'),
        metrics={'accuracy/top1': 'top-1'},
        tests={
            '97 validation crops': (),
            '203 training crops': ('test_dataloader.dataset.data_prefix=train',),
        },
    ),
    'detection': Task(
        configs=configs('mask-rcnn_', '1xb4-200i_mini-coco', '_sfp', '_fpn'),
        metrics={'coco/bbox_mAP': 'box mAP', 'coco/segm_mAP': 'mask mAP'},
        tests={'its 16 training pictures': ()},
        factor=100.0,
    ),
    'segmentation': Task(
        configs=configs('upernet_', '1xb4-250i_mini-ade-256x256', '_sfp'),
        metrics={'mIoU': 'mIoU'},
        tests={'its 28 training pictures': ()},
    ),
}
NOTE = (
    'These are scores on mini data after minutes of training: they show that training works and '
    'say nothing about the full data sets.'
)


class StepError(Exception):
    """A step failed; the message is one sentence with the path of its log."""


class StepStopped(Exception):
    """A signal ended the run; `status` is the exit status to give."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Stop:
    """Waits for the running steps when the user or the system asks to stop."""

    def __init__(self) -> None:
        self.number = 0
        self.processes: set[subprocess.Popen] = set()
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.number = number
        # A terminal sends Ctrl-C to the step as well; SIGTERM comes to this process alone.
        if number == signal.SIGTERM:
            for process in tuple(self.processes):
                process.send_signal(number)


class Quickstart:
    """Runs the steps of the tasks and keeps what they found.

    Args:
        backbone: One of BACKBONES.
        folder: Where logs, checkpoints, pictures and the summary go.
        device: 'auto', 'cpu' or 'cuda', passed on.
        jobs: How many tasks run at the same time.
    """

    def __init__(self, backbone: str, folder: Path, device: str, jobs: int) -> None:
        self.backbone = backbone
        self.folder = folder
        self.device = device
        self.jobs = jobs
        self.stop = Stop()

    def run_tasks(self, names: Sequence[str]) -> list[dict]:
        """Runs the tasks and returns their rows of the table; after a failure none is begun."""
        failed = threading.Event()

        def run(name: str) -> list[dict]:
            if failed.is_set():
                return []
            try:
                return self.run_task(name)
            except Exception:
                failed.set()
                raise

        with ThreadPoolExecutor(self.jobs) as pool:
            tasks = [pool.submit(run, name) for name in names]
        return [row for task in tasks for row in task.result()]

    def run_task(self, name: str) -> list[dict]:
        """Runs the steps of a task that are not done yet and returns its rows of the table."""
        folder = self.folder / name
        state = self._load_state(name)
        for number, step in enumerate(STEPS, start=1):
            title = f'[{name} {number}/{len(STEPS)}] {STEPS[step]}'
            if step in state['done']:
                print(f'{title}: done before.', flush=True)
                continue
            if self.stop.number:
                raise StepStopped(128 + self.stop.number)
            print(f'{title} ...', flush=True)
            start = time.monotonic()
            try:
                for command in self._commands(name, step):
                    self._run(name, step, command)
                state['done'].append(step)
            finally:
                state['seconds'] += time.monotonic() - start
                write_json(folder / 'state.json', state)
        return self._rows(name, state['seconds'] / 60)

    def _config(self, name: str) -> str:
        return TASKS[name].configs[self.backbone]

    def _load_state(self, name: str) -> dict:
        """Returns what earlier runs did; they count as long as the configs are the same."""
        folder = self.folder / name
        file = folder / 'state.json'
        digest = digest_of(ROOT / self._config(name))
        if file.is_file():
            state = json.loads(file.read_text())
            if state['config'] == digest:
                return state
            print(f'The config of {name} has changed: starting it anew.', flush=True)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        return {'config': digest, 'done': [], 'seconds': 0.0}

    def _commands(self, name: str, step: str) -> list[list[str]]:
        """Returns the command lines of a step, without the interpreter."""
        folder, config = self.folder / name, self._config(name)
        train_dir = folder / name  # the name is the title of the curves
        if step == 'curves':
            out = str(folder / 'curves.png')
            return [['tools/analysis/plot_curves.py', str(train_dir), '--out', out]]
        common = ['--device', self.device, '--work-dir']
        if step == 'train':
            return [['tools/train.py', config, '--resume', *common, str(train_dir)]]
        checkpoint = 'none'
        if step == 'after':
            pointer = train_dir / 'last_checkpoint'
            if not pointer.is_file():
                raise StepError(f'{name}: {pointer} is gone: train again with --fresh.')
            checkpoint = str(train_dir / Path(pointer.read_text().strip()).name)
        commands = []
        for number, options in enumerate(TASKS[name].tests.values()):
            command = ['tools/test.py', config, checkpoint, *common, str(folder / step)]
            command += ['--out', str(folder / f'{step}_{number}.json')]
            if step == 'after' and number == 0:
                command += ['--show-dir', str(folder / 'predictions')]
            commands.append([*command, '--cfg-options', *options] if options else command)
        return commands

    def _run(self, name: str, step: str, command: list[str]) -> None:
        """Runs one step, shows its progress and keeps its output."""
        log = self.folder / name / f'{step}.log'
        environment = {**os.environ, 'PYTHONUNBUFFERED': '1'}
        with log.open('a') as file:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors='replace',
            )
            self.stop.processes.add(process)
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                text = progress(line, TASKS[name].metrics)
                if text:
                    label = f'{name}: ' if self.jobs > 1 else ''
                    print(f'    {label}{text}', flush=True)
            status = process.wait()
        self.stop.processes.discard(process)
        if self.stop.number:
            raise StepStopped(128 + self.stop.number)
        if status:
            last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
            raise StepError(
                f'{name}: {STEPS[step]} failed with status {status}; its output is in {log}'
                f'{", the last line is: " + last[0] if last else ""}'
            )

    def _rows(self, name: str, minutes: float) -> list[dict]:
        task, folder = TASKS[name], self.folder / name
        rows = []
        for number, pictures in enumerate(task.tests):
            before, after = (
                json.loads((folder / f'{step}_{number}.json').read_text())
                for step in ('before', 'after')
            )
            rows += [
                {
                    'task': name,
                    'metric': f'{label} (%)',
                    'measured on': pictures,
                    'untrained': before[key] * task.factor,
                    'trained': after[key] * task.factor,
                    'minutes': minutes,
                    'config': self._config(name),
                    'curves': str(folder / 'curves.png'),
                    'predictions': str(folder / 'predictions'),
                }
                for key, label in task.metrics.items()
            ]
        return rows


def digest_of(config: Path) -> str:
    """Returns what changes with a config or with a config of this project that it builds on."""
    files = [config]
    for file in files:  # grows on the way
        for statement in ast.parse(file.read_text()).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets) == '_base_':
                bases = ast.literal_eval(statement.value)
                bases = [bases] if isinstance(bases, str) else bases
                files += [file.parent / base for base in bases if '::' not in base]
    return hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()


def progress(line: str, metrics: Iterable[str]) -> str | None:
    """Shortens a progress line of a log; returns None for any other line."""
    match = re.search(r'((?:Iter|Epoch)\((?:train|val|test)\))\s*(\[.*?\])(.*)', line)
    if match is None:
        return None
    shown = ('eta', 'loss', *metrics)
    values = [
        f'{key} {value}' for key, value in re.findall(r'(\S+): (\S+)', match[3]) if key in shown
    ]
    return f'{match[1]} {match[2]}  {"  ".join(values)}'.rstrip()


def jobs_for(device: str, tasks: int) -> int:
    """How many tasks to run at the same time: all of them beside a GPU with two cores for each."""
    if device == 'cpu' or len(os.sched_getaffinity(0)) < 2 * tasks:
        return 1
    import torch

    return tasks if torch.cuda.is_available() else 1


def table(rows: Sequence[dict]) -> str:
    """Lays the rows out in aligned columns."""
    columns = ('task', 'metric', 'measured on', 'untrained', 'trained', 'minutes')
    lines: list[Sequence[str]] = [columns]
    for row in rows:
        cells = (row[column] for column in columns)
        lines.append([f'{cell:.1f}' if isinstance(cell, float) else cell for cell in cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    texts = [
        '  '.join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return '\n'.join([texts[0], '-' * max(map(len, texts)), *texts[1:]])


def with_earlier_rows(folder: Path, rows: list[dict]) -> list[dict]:
    """Adds to the rows those that earlier runs wrote for other tasks, in the order of TASKS."""
    file = folder / 'summary.json'
    earlier = json.loads(file.read_text())['rows'] if file.is_file() else []
    done = {row['task'] for row in rows}
    merged = rows + [row for row in earlier if row['task'] not in done]
    return sorted(merged, key=lambda row: list(TASKS).index(row['task']))


def write_json(path: Path, content: object) -> None:
    """Writes a file that is either complete or the one before."""
    part = path.with_suffix('.part')
    part.write_text(json.dumps(content, indent=2) + '\n')
    part.replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the arguments, runs the tasks and prints the table."""
    parser = argparse.ArgumentParser(description='Train and test the three tasks on data/mini.')
    parser.add_argument(
        '--tasks',
        nargs='+',
        choices=TASKS,
        default=list(TASKS),
        metavar='TASK',
        help=f'any of {", ".join(TASKS)} (default: all)',
    )
    parser.add_argument(
        '--backbone',
        choices=BACKBONES,
        default=BACKBONES[0],
        help=f'family of the network (default: {BACKBONES[0]})',
    )
    parser.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=ROOT / 'work_dirs' / 'quickstart',
        help='logs, checkpoints, pictures and the summary go to a folder in it, one a backbone',
    )
    parser.add_argument(
        '--jobs', type=int, help='tasks run at the same time (default: all beside a GPU, else 1)'
    )
    parser.add_argument(
        '--fresh', action='store_true', help='start anew instead of using what earlier runs did'
    )
    args = parser.parse_args(argv)
    folder = args.work_dir.resolve() / args.backbone
    if args.jobs is not None and args.jobs < 1:
        parser.error(f'--jobs must be at least 1, not {args.jobs}')
    jobs = args.jobs or jobs_for(args.device, len(args.tasks))
    quickstart = Quickstart(args.backbone, folder, args.device, jobs)
    try:
        for name in args.tasks:
            if args.fresh and (folder / name).exists():
                shutil.rmtree(folder / name)
        rows = quickstart.run_tasks(args.tasks)
    except StepStopped as stopped:
        print('Stopped; the same command goes on from here.', file=sys.stderr)
        return stopped.status
    except StepError as error:
        print(f'{parser.prog}: {error}', file=sys.stderr)
        return 1
    write_json(folder / 'summary.json', {'note': NOTE, 'rows': with_earlier_rows(folder, rows)})
    print(f'\n{table(rows)}\n\n{NOTE}\n')
    for name in args.tasks:
        print(f'{name}: curves {folder / name / "curves.png"}')
        print(f'{" " * len(name)}  predictions {folder / name / "predictions"}')
    print(f'Summary: {folder / "summary.json"}')
    return 0


if __name__ == '__main__':
    sys.exit(main())

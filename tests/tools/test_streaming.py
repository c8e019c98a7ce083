import gc
import io
import json
import re
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linvis.models import ViR
from tools.analysis import streaming

Way = streaming.Way
WAYS = (
    Way('stream', 'host', 2),
    Way('recurrent', 'host', 1),
    Way('chunkwise'),
    Way('parallel'),
)
ARCH = {'embed_dims': 16, 'depth': 2, 'num_heads': 2}
SMALL = ('--width', '48', '--band', '2', '--device', 'cpu')


@pytest.fixture(autouse=True)
def one_run(monkeypatch):
    monkeypatch.setattr(streaming, 'SECONDS', 0.0)


@pytest.fixture
def archs(monkeypatch):
    monkeypatch.setattr(ViR, 'archs', {'small': ARCH})


def run(monkeypatch, *arguments):
    monkeypatch.setattr('sys.argv', ['streaming.py', *arguments])
    return streaming.main()


def picture_of(height, width=48):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize('retention', ['1d', '2d'])
def test_all_forms_give_the_same_features(archs, retention):
    model = streaming.build('small', retention, 'cpu')
    picture = picture_of(150)
    expected = None
    for way in WAYS:
        parts = list(streaming.features(model, picture, way))
        assert len(parts) == {'stream': 5, 'recurrent': 10}.get(way.form, 1)
        maps = torch.cat(parts, 2)
        assert maps.shape == (1, 16, 10, 3)
        expected = maps if expected is None else expected
        torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-5)


def test_operator_counts_in_the_features(archs):
    model = streaming.build('small', '2d', 'cpu')
    (maps,) = streaming.features(model, picture_of(64), Way('chunkwise'))
    for block in model.blocks:
        block.retention.out_proj.weight.data.zero_()
    (without,) = streaming.features(model, picture_of(64), Way('chunkwise'))
    assert (maps - without).abs().max() > 1e-3


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors held at once, beside those of what was there before."""

    def __init__(self, there):
        super().__init__()
        self.now = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            weakref.finalize(storage, self.release, key, size)

    def release(self, key, size):
        self.known.remove(key)
        self.now -= size


def peak_of(way, height):
    model = streaming.build('small', '2d', 'cpu')
    picture = picture_of(height)
    gc.collect()
    with LiveBytes([picture, *model.parameters(), *model.buffers()]) as live:
        streaming.exhaust(streaming.features(model, picture, way))
    return live.peak


@pytest.mark.parametrize('band', [1, 4])
def test_memory_of_streamed_forms_does_not_grow_with_the_height(archs, band):
    way = Way('stream', 'host', band)
    low = peak_of(way, 512)
    assert low > 10_000
    assert peak_of(way, 8192) == low


def test_memory_of_other_forms_grows(archs):
    assert peak_of(Way('chunkwise'), 2048) > 3.5 * peak_of(Way('chunkwise'), 512)
    assert peak_of(Way('parallel'), 1024) > 2.5 * peak_of(Way('parallel'), 512)


def test_rows_of_every_form_dtype_and_height(archs, monkeypatch, capsys, tmp_path):
    out = tmp_path / 'rows.json'
    heights = ('--height', '96', '64', '128', '--parallel-height', '96', '--compare-height', '64')
    bands = ('--band', '2', '3')
    assert run(monkeypatch, *SMALL, *bands, *heights, '--out', str(out)) == 0
    written = json.loads(out.read_text())
    assert written['header']['gpu'] is None
    assert written['header']['command'].startswith('python tools/analysis/streaming.py --width 48')
    rows = written['rows']
    keys = ('dtype', 'form', 'launch', 'band', 'height')
    assert [tuple(row[key] for key in keys) for row in rows] == [
        (dtype, *way, height)
        for dtype in ('float32', 'bfloat16')
        for way in (WAYS[0], Way('stream', 'host', 3), *WAYS[1:])
        for height in (64, 96, 128)
        if not (way.form == 'parallel' and height > 96)
    ]
    assert all(row['ms'] > 0 and row['images_s'] > 0 for row in rows)
    assert {row['height'] for row in rows if 'difference' in row} == {64}
    for row in rows[::3]:
        if 'difference' in row:
            low, high = (0, 1e-5) if row['dtype'] == 'float32' else (1e-4, 0.2)
            assert low <= row['difference'] < high
    lines = capsys.readouterr().out.splitlines()
    assert lines[2 + len(rows) :] == [f'Wrote {out}.']
    place, retention = lines[0].split('. ')
    assert place == f'Runs on the CPU, {torch.get_num_threads()} thread(s)'
    retention = re.sub(r' \(no triton: [^)]*\)', '', retention)
    assert retention == (
        'Retention: stream by torch, states by products of PyTorch, recurrent by torch, states by '
        'products of PyTorch, chunkwise by torch, parallel by reference.'
    )
    assert lines[2].split()[:7] == ['stream', '2', 'host', 'float32', '48', 'x', '64']


def test_form_that_fails_is_not_tried_at_greater_heights(archs, monkeypatch, capsys):
    features = streaming.features

    def scarce(model, picture, way):
        if way.form != 'stream' and picture.shape[1] > 64:
            raise torch.OutOfMemoryError('no memory\nwhatever')
        yield from features(model, picture, way)

    monkeypatch.setattr(streaming, 'features', scarce)
    forms = ('--form', 'chunkwise', 'stream', '--dtype', 'float32')
    heights = ('--height', '64', '96', '128')
    assert run(monkeypatch, *SMALL, *heights, *forms) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 2 + 2 + 3
    assert lines[3].split()[5:] == ['OutOfMemoryError:', 'no', 'memory']
    assert printed.err == 'Not compared from a height of 96 on: no memory\n'
    assert run(monkeypatch, *SMALL, *heights, '--form', 'recurrent') == 1


def test_growth_of_memory():
    way = Way('stream', 'graph', 16)
    row = {**way._asdict(), 'dtype': 'bfloat16'}
    rows = [
        {**row, 'peak_mib': 100.0, 'held_mib': 200.0},
        {**row, 'peak_mib': 104.0, 'held_mib': 201.0},
        {**row, 'failed': 'x'},
        {**row, 'dtype': 'float32', 'peak_mib': 300.0, 'held_mib': 300.0},
        {**row, 'launch': 'host', 'peak_mib': 300.0, 'held_mib': 300.0},
        {**row, 'band': 32, 'peak_mib': 300.0, 'held_mib': 300.0},
    ]
    assert streaming.growth(rows, way, 'bfloat16') == (
        'stream 16 graph in bfloat16: peak memory 100.0 to 104.0 MiB, +4.0%; '
        'held memory 200.0 to 201.0 MiB, +0.5%'
    )
    assert streaming.growth(rows, Way('chunkwise'), 'bfloat16') is None


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['--width', '0'], "argument --width: expected a whole number from 1 on, got '0'"),
        (['--band', '-1'], "argument --band: expected a whole number from 1 on, got '-1'"),
        (['--height', '64', 'tall'], "--height: expected a whole number from 1 on, got 'tall'"),
        (['--form', 'strem'], "argument --form: invalid choice: 'strem' (choose from "),
        (['--dtype', 'bf16'], "argument --dtype: invalid choice: 'bf16' (choose from "),
        (['--device', 'gpu'], '--device takes auto, cpu, cuda or cuda:N, got gpu'),
        (
            ['--launch', 'host', 'graph', '--device', 'cpu'],
            '--launch graph needs a CUDA GPU, and --device is cpu',
        ),
        (['--out', 'nowhere/a.json'], '--out: there is no folder nowhere; make it first'),
        (['--out', '.'], "--out: expected a file, got the folder '.'"),
    ],
)
def test_wrong_command_line_is_told_in_one_line(monkeypatch, capsys, arguments, expected):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert expected in message
    assert message.startswith('streaming.py: ')
    assert message.count('\n') == 1


def test_absent_gpu_and_backend_are_told_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit):
        run(monkeypatch, '--device', 'cuda')
    assert 'finds no usable GPU here; use --device cpu' in capsys.readouterr().err
    monkeypatch.setenv('LINVIS_OPS_BACKEND', 'triton')
    with pytest.raises(SystemExit):
        run(monkeypatch, '--device', 'cpu')
    assert 'retention: triton cannot run, since there is no CUDA device' in capsys.readouterr().err


def test_backend_of_the_cpu_beside_a_gpu(monkeypatch):
    reasons = {'triton': 'the inputs are on cpu', 'torch': None, 'reference': None}
    monkeypatch.setattr(streaming, 'default_backend', lambda op: 'triton')
    monkeypatch.setattr(streaming, 'available_backends', lambda op, *tensors: reasons)
    assert streaming.backend_on('cpu') == 'torch (no triton: the inputs are on cpu)'
    monkeypatch.setitem(reasons, 'triton', None)
    assert streaming.backend_on('cpu') == 'triton'


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize('table_too', [False, True])
def test_terminal_shows_what_is_measured_and_how_far(archs, monkeypatch, capsys, table_too):
    for name in ('NO_COLOR', 'TERM'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('COLUMNS', '80')
    err = Terminal()
    monkeypatch.setattr('sys.stderr', err)
    if table_too:
        monkeypatch.setattr('sys.stdout', err)
    options = ('--form', 'stream', 'parallel', '--dtype', 'float32', '--compare-height', '64')
    heights = ('--height', '64', '128', '--parallel-height', '64')
    assert run(monkeypatch, *SMALL, *options, *heights) == 0
    shown = re.sub(r'\x1b\[[^a-zA-Z]*[a-zA-Z]', '', err.getvalue())
    for what in (
        'parallel float32 48 x 64, to compare with',
        'stream 2 host float32 48 x 128',
        'parallel float32 48 x 64',
    ):
        assert what in shown
    assert re.search(r'0/4\b', shown)
    assert re.search(r'4/4\b', shown)
    table = shown if table_too else capsys.readouterr().out
    row = re.search(r'[\r\n](stream 2 host  +float32  +48 x 128 .*)', table)[1]
    assert len(row) > 80  # not broken
    assert ('stream 2 host      float32 ' in shown) == table_too


@pytest.mark.gpu
def test_memory_is_flat_on_a_gpu(monkeypatch, tmp_path):
    out = tmp_path / 'rows.json'
    options = ('--form', 'stream', 'chunkwise', '--height', '1024', '4096', '--width', '256')
    assert run(monkeypatch, *options, '--out', str(out)) == 0
    rows = json.loads(out.read_text())['rows']
    for dtype in ('float32', 'bfloat16'):
        for name in ('peak_mib', 'held_mib'):
            host, high, graph, high_by_graph, _, whole = (
                row[name] for row in rows if row['dtype'] == dtype
            )
            assert high <= 1.1 * host
            assert high_by_graph <= 1.1 * graph
            assert whole > high or name == 'held_mib'

"""The CUDA backend of Bi-WKV: its arithmetic, thread by thread on the CPU, and its availability."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from linvis_ops import BackendUnavailableError, available_backends, bi_wkv
from linvis_ops.bi_wkv import cuda
from linvis_ops.bi_wkv.reference import bi_wkv_quadratic
from linvis_ops.testing import assert_matches, bi_wkv_inputs, gradients

ROOT = Path(__file__).parents[2]
NAMES = ('dw', 'du', 'dk', 'dv')
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@pytest.fixture(scope='module')
def host(tmp_path_factory):
    """The phases of the kernels, compiled for the CPU."""
    compiler = shutil.which('g++')
    if compiler is None:
        pytest.skip('there is no g++')
    library = tmp_path_factory.mktemp('host') / 'bi_wkv_host.so'
    include = Path(torch.__file__).parent / 'include'
    command = [compiler, '-std=c++17', '-O1', '-shared', '-fPIC', '-Wall', '-Wextra', '-Werror']
    command += ['-Wno-unknown-pragmas', f'-I{ROOT / "ops/csrc"}', '-isystem', str(include)]
    command += [str(Path(__file__).with_name('bi_wkv_host.cpp')), '-o', str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def pointers(*tensors):
    return (ctypes.c_void_p * 8)(*[None if t is None else t.data_ptr() for t in tensors])


def division(host, shape, element_size, backward, multiprocessors=132):
    """Rows, segments, tokens of a row, threads along the channels."""
    result = (ctypes.c_int * 4)()
    sizes = (ctypes.c_int64 * 3)(*shape)
    host.bi_wkv_division(element_size, backward, sizes, multiprocessors, result)
    return tuple(result)


def run(host, w, u, k, v, g=None, rows=None, paired=False):
    """y, or the four gradients if there is g; by default in the rows that a GPU would be given."""
    backward = g is not None
    batch, tokens, channels = v.shape
    given_rows, _, length, _ = division(host, v.shape, v.element_size(), backward)
    rows = min(rows or given_rows, -(-tokens // length))
    segments = -(-tokens // (rows * length))
    first, second = torch.empty(v.shape, dtype=v.dtype), torch.empty(v.shape, dtype=v.dtype)
    partial = torch.empty(2, batch * segments, channels)
    given = [x if x is None or x.stride(2) == 1 else x.contiguous() for x in (k, v, g)]
    strides = [s for x in given for s in ((0, 0) if x is None else x.stride()[:2])]
    host.bi_wkv_run(
        DTYPES[v.dtype], backward, paired, rows, pointers(w, u, *given, first, second, partial),
        (ctypes.c_int64 * 6)(*strides), (ctypes.c_int64 * 3)(*v.shape),
    )  # fmt: skip
    return (*partial.sum(1), second, first) if backward else first


def check(host, inputs, rows=None, paired=False, factor=2.0):
    dtype = inputs[3].dtype
    exact = [t.detach().double().requires_grad_() for t in inputs]
    plain = [t.detach().requires_grad_() for t in inputs]
    given = [t.detach() for t in inputs]
    y64, y_plain = bi_wkv_quadratic(*exact), bi_wkv_quadratic(*plain)
    y = run(host, *given, rows=rows, paired=paired)
    assert_matches('y', y, y64, y_plain, dtype)
    g = torch.randn(y64.shape, dtype=torch.float64).to(dtype)
    result = run(host, *given, g, rows=rows, paired=paired)
    for name, a, e, p in zip(
        NAMES, result, gradients(y64, exact, g), gradients(y_plain, plain, g), strict=True
    ):
        # those by w and u are float32 beside tokens of 16 bits
        assert_matches(name, a, e, p, a.dtype, factor)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('tokens', [1, 2, 7, 8, 9, 16, 17, 49, 196, 512])
def test_sequences_of_one_thread_block(host, tokens, dtype):
    check(host, bi_wkv_inputs(2, tokens, 5, dtype))


@pytest.mark.parametrize('channels', [1, 3, 32, 34, 70])
@pytest.mark.parametrize('rows', [3, None])
def test_channels(host, rows, channels):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = bi_wkv_inputs(2, 60, channels, dtype)
        check(host, inputs, rows)
        if channels % 2 == 0:
            check(host, inputs, rows, paired=True)


@pytest.mark.parametrize('rows', [1, 2, 4, 5, 16])
@pytest.mark.parametrize('tokens', [17, 129, 300])
def test_segments(host, tokens, rows):
    for dtype in (torch.float32, torch.bfloat16):
        check(host, bi_wkv_inputs(2, tokens, 6, dtype, decay=0.3), rows)


@pytest.mark.parametrize('rows', [2, None])
@pytest.mark.parametrize('decay', [0.0, 1.0, 2.0, 12.0, 30.0])
@pytest.mark.parametrize('keys', ['wide', 'equal'])
@pytest.mark.parametrize('tokens', [12, 197])
def test_extreme_inputs_are_finite_and_right(host, tokens, keys, decay, rows):
    w, u, k, v = bi_wkv_inputs(1, tokens, 8, decay=decay)
    with torch.no_grad():
        k.uniform_(-80, 80) if keys == 'wide' else k.fill_(-80.0)
    # where far tokens weigh most, they dominate all tokens, and v - y cancels: README.md, Numerics
    check(host, (w, u, k, v), rows, factor=4.0)


@pytest.mark.parametrize('rows', [2, None])
@pytest.mark.parametrize('decay', [None, 30.0])
@pytest.mark.parametrize('masked', [slice(40, None), slice(0, 33), slice(15, 49)], ids=str)
def test_keys_of_minus_infinity_take_tokens_out(host, masked, decay, rows):
    w, u, k, v = bi_wkv_inputs(1, 64, 8, decay=decay)
    with torch.no_grad():
        k[:, masked] = -torch.inf
    check(host, (w, u, k, v), rows, factor=4.0)


@pytest.mark.parametrize('bonus', [-30.0, -19.0, 19.0, 30.0])
def test_large_bonus_of_either_sign(host, bonus):
    w, u, k, v = bi_wkv_inputs(1, 6, 8)
    with torch.no_grad():
        u.fill_(bonus)
    check(host, (w, u, k, v))


@pytest.mark.parametrize('backward', [False, True])
@pytest.mark.parametrize('element_size', [2, 4])
@pytest.mark.parametrize(
    'shape', [(1, 1, 1), (128, 196, 192), (2, 513, 7), (1, 65536, 192), (2, 4200, 768)]
)
def test_division_covers_the_sequence(host, shape, element_size, backward):
    rows, segments, length, pairs = division(host, shape, element_size, backward)
    assert (segments - 1) * rows * length < shape[1] <= segments * rows * length
    assert rows * pairs <= 512


def test_a_sequence_of_196_tokens_is_one_segment(host):
    for backward in (False, True):
        assert division(host, (128, 196, 192), 2, backward)[1] == 1


def test_strides(host):
    w, u, _, v = (t.detach() for t in bi_wkv_inputs(2, 40, 12))
    wide = torch.randn(2, 40, 36)
    g = torch.randn(2, 1, 12).expand(-1, 40, -1)
    expected = run(host, w, u, wide[..., 12:24].contiguous(), v, g.contiguous(), rows=2)
    actual = run(host, w, u, wide[..., 12:24], v, g, rows=2, paired=True)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


# The streaming kernel


def test_shapes_of_the_streaming_kernels(host):
    shapes = (ctypes.c_int * 18)()
    host.bi_wkv_stream_shapes(shapes)
    short, two, three, short_backward, backward, wide = zip(*[iter(shapes)] * 3, strict=True)
    assert short[:2] == short_backward[:2] == (14, 196)
    assert two[:2] == three[:2] == (16, cuda.FORWARD.segment)
    assert backward[:2] == (16, cuda.BACKWARD.segment)
    # two thread blocks on an H100 and on an A100, one on a GPU with 99 KiB for a thread block
    assert 2 * (three[2] + 1024) <= 228 * 1024
    assert 2 * (two[2] + 1024) <= 164 * 1024
    assert max(two[2], short_backward[2], backward[2]) <= 99 * 1024
    assert 2 * (backward[2] + 1024) <= 228 * 1024
    assert wide[1] >= cuda.BACKWARD.segment
    assert wide[2] <= 227 * 1024


@pytest.mark.parametrize('blocks', [1, 4, 7, 264])
@pytest.mark.parametrize('division', [(128, 6, 1), (2, 3, 5), (1, 7, 4), (3, 1, 4)])
def test_items_of_the_streaming_kernel_are_each_done_once_and_in_step(host, division, blocks):
    batch, tiles, segments = division
    items = batch * tiles * segments
    blocks = min(blocks, items)
    turns = {}
    for block in range(blocks):
        out = (ctypes.c_int * (3 * items))()
        count = host.bi_wkv_stream_items(batch, tiles, segments, block, blocks, out)
        for turn in range(count):
            place = tuple(out[3 * turn : 3 * turn + 3])
            assert place not in turns
            turns[place] = turn
    assert len(turns) == items
    assert all(0 <= n < bound for place in turns for n, bound in zip(place, division, strict=True))
    if segments > blocks:
        return
    # a thread block sums up its next item before it waits for the segments of this one
    for b in range(batch):
        for tile in range(tiles):
            at = [turns[b, tile, n] for n in range(segments)]
            assert max(at) - min(at) <= 1


def by_pairs(host, w, u, k, v):
    y = torch.empty(v.shape)
    host.bi_wkv_stream_pairs(
        int(v.shape[1] > 196), pointers(w, u, k, v, y, None, None, None),
        (ctypes.c_int64 * 4)(*k.stride()[:2], *v.stride()[:2]), (ctypes.c_int64 * 3)(*v.shape),
    )  # fmt: skip
    return y


@pytest.mark.parametrize('decay', [None, 1.0, 30.0])
@pytest.mark.parametrize('keys', ['normal', 'wide', 'equal', 'none', 'end'])
@pytest.mark.parametrize('tokens', [1, 14, 15, 196, 197, 256, 257, 600])
def test_outputs_by_pairs_are_right_for_any_inputs(host, tokens, keys, decay):
    w, u, k, v = (t.detach() for t in bi_wkv_inputs(1, tokens, 3, decay=decay))
    if keys == 'wide':
        k.uniform_(-200, 200)
    elif keys == 'equal':
        k.fill_(-300.0)
    elif keys == 'none':
        k[:, 1:] = -torch.inf
    elif keys == 'end':
        k[:, tokens // 3 + 1 :] = -torch.inf
    inputs = (w, u, k, v)
    expected = bi_wkv_quadratic(*(t.double() for t in inputs))
    assert_matches('y', by_pairs(host, *inputs), expected, bi_wkv_quadratic(*inputs), torch.float32)


def test_outputs_by_pairs_of_several_sequences_and_tiles(host):
    w, u, _, v = (t.detach() for t in bi_wkv_inputs(2, 300, 40))
    k = torch.randn(2, 300, 120)[..., 40:80]
    expected = bi_wkv_quadratic(*(t.double() for t in (w, u, k, v)))
    assert_matches('y', by_pairs(host, w, u, k, v), expected, None, torch.float32)


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_outputs_by_pairs_hide_no_key_that_is_not_a_number(host, value):
    w, u, k, v = (t.detach() for t in bi_wkv_inputs(1, 300, 2))
    k[0, 7, 1] = value
    y = by_pairs(host, w, u, k, v)
    assert y[..., 0].isfinite().all()
    assert y[..., 1].isnan().all()


def tokens_on_gpu(batch, tokens, channels, dtype=torch.bfloat16, strides=None, offset=0):
    """As much of a tensor on a GPU as the choice of a kernel looks at."""
    strides = strides or (tokens * channels, channels, 1)
    return SimpleNamespace(
        device=torch.device('cuda', 0),
        dtype=dtype,
        shape=torch.Size((batch, tokens, channels)),
        stride=lambda i: strides[i],
        data_ptr=lambda: 4096 + offset,
    )


@pytest.fixture
def device(monkeypatch):
    """Let a GPU have so many multiprocessors."""

    def choose(multiprocessors=132):
        monkeypatch.setattr(cuda, 'rules_of', lambda _device: (None, multiprocessors))

    choose()
    return choose


backward_too = pytest.mark.parametrize('backward', [False, True], ids=['forward', 'backward'])


@pytest.mark.parametrize(
    ('taken', 'arguments'),
    [
        (True, {}),
        (True, {'dtype': torch.float16}),
        (False, {'dtype': torch.float32}),
        (False, {'channels': 12}),
        (True, {'strides': (196 * 64, 64, 1)}),
        (False, {'strides': (196 * 36, 36, 1)}),
        (False, {'strides': (196 * 32, 1, 196)}),
        (False, {'strides': (0, 0, 0)}),
        (False, {'offset': 8}),
    ],
    ids=str,
)
@backward_too
def test_where_a_streaming_kernel_is_used(device, backward, taken, arguments):
    default = {'batch': 2, 'tokens': 196, 'channels': 32}
    good, given = tokens_on_gpu(**default), tokens_on_gpu(**{**default, **arguments})
    count = 3 if backward else 2
    assert cuda.streams(*[good] * count)
    assert cuda.streams(*[given] * count) is taken
    if 'dtype' not in arguments:
        for i in range(count):
            assert cuda.streams(*[given if i == j else good for j in range(count)]) is taken


@backward_too
def test_how_long_sequences_may_be(device, backward):
    limits, count = (cuda.BACKWARD, 3) if backward else (cuda.FORWARD, 2)

    def taken(tokens):
        return cuda.streams(*[tokens_on_gpu(1, tokens, 32)] * count)

    assert taken(limits.least_tokens)
    assert not taken(limits.least_tokens - 1)
    assert taken(limits.most_tokens)
    assert not taken(limits.most_tokens + 1)
    # segments that cannot all be at work at once are left to another kernel
    device(multiprocessors=20)
    assert taken(20 * limits.segment)
    assert not taken(20 * limits.segment + 1)


@backward_too
def test_the_streaming_kernels_are_not_for_tensors_on_a_cpu(backward):
    _, _, k, v = bi_wkv_inputs(1, 196, 32, torch.bfloat16)
    assert not cuda.streams(k, v, *[v] * backward)


@backward_too
def test_these_kernels_lead_where_they_stream_on_gpus_that_were_measured(
    device, backward, monkeypatch
):
    short, long, longer = (tokens_on_gpu(1, n, 32) for n in (20, 200, 20_000))
    for capability, leads in (((9, 0), True), ((8, 0), False)):
        monkeypatch.setattr('torch.cuda.get_device_capability', lambda _, c=capability: c)
        assert not cuda.leads(short, short, None, None, *[short] * backward)
        assert cuda.leads(long, long, None, None, *[long] * backward) is leads
        # Triton's forward pass is faster there
        assert cuda.streams(longer, longer, longer if backward else None)
        assert cuda.leads(longer, longer, None, None, *[longer] * backward) is (leads and backward)


@pytest.mark.parametrize('taken', [True, False])
def test_the_kernel_that_takes_a_pass_runs_it(monkeypatch, taken):
    asked = []
    operators = SimpleNamespace(
        bi_wkv_stream_fwd=lambda *_: 'streaming',
        bi_wkv_fwd=lambda *_: 'other',
        bi_wkv_stream_bwd=lambda *_: 'streaming',
        bi_wkv_bwd=lambda *_: 'other',
    )
    fake = SimpleNamespace(ops=SimpleNamespace(linvis_cuda=operators))
    monkeypatch.setattr(cuda, 'torch', fake)
    monkeypatch.setattr(cuda, 'streams', lambda *tokens: asked.append(tokens) or taken)
    expected = 'streaming' if taken else 'other'
    assert cuda.bi_wkv_forward('w', 'u', 'k', 'v') == expected
    assert cuda.bi_wkv_backward('gy', 'w', 'u', 'k', 'v') == expected
    assert asked == [('k', 'v'), ('k', 'v', 'gy')]


# Availability


@pytest.fixture
def importing(monkeypatch):
    """Let importing the extension raise an error, or succeed."""

    def choose(error):
        def import_module(name):
            assert name == 'linvis_ops._C'
            if error is not None:
                raise error

        importlib = SimpleNamespace(import_module=import_module)
        monkeypatch.setattr(cuda, 'importlib', importlib)
        cuda.extension_error.cache_clear()

    yield choose
    cuda.extension_error.cache_clear()


def test_an_extension_that_was_not_built_is_named_with_its_remedy(importing):
    importing(ModuleNotFoundError("No module named 'linvis_ops._C'"))
    reason = 'linvis_ops was installed without its CUDA extension; build with LINVIS_BUILD_CUDA=1'
    assert available_backends('bi_wkv')['cuda'] == reason
    with pytest.raises(BackendUnavailableError, match=f'cuda cannot run, since {reason}'):
        bi_wkv(*bi_wkv_inputs(1, 4, 2), backend='cuda')


def test_an_extension_of_another_pytorch_is_a_reason_not_a_traceback(importing):
    importing(ImportError('undefined symbol: x'))
    assert available_backends('bi_wkv')['cuda'] == (
        'its CUDA extension cannot be loaded (undefined symbol: x); build it again for this PyTorch'
    )


def test_inputs_that_the_extension_cannot_take(importing, monkeypatch):
    importing(None)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert cuda.cuda_unavailable() == 'there is no CUDA device'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert cuda.cuda_unavailable() is None
    assert cuda.cuda_unavailable(torch.zeros(1)) == 'the inputs are on cpu'
    on_gpu = tokens_on_gpu(1, 4, 8)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _device: (7, 5))
    assert 'compute capability 8.0' in cuda.cuda_unavailable(on_gpu, on_gpu)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _device: (8, 0))
    assert cuda.cuda_unavailable(on_gpu, on_gpu) is None

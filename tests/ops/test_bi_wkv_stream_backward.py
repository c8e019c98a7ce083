"""The streaming CUDA kernel of Bi-WKV's backward pass, on a GPU."""

import pytest
import torch

from linvis_ops import bi_wkv
from linvis_ops.bi_wkv import cuda
from linvis_ops.bi_wkv.reference import bi_wkv_backward
from linvis_ops.testing import FLOORS, assert_matches, bi_wkv_inputs, gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.extension_error() is not None, reason=str(cuda.extension_error())),
]
NAMES = ('dw', 'du', 'dk', 'dv')
DTYPES = {'f16': torch.float16, 'bf16': torch.bfloat16}
dtypes = pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)


def inputs_of(batch, tokens, channels, dtype=torch.bfloat16, device='cuda', **kwargs):
    """gy, w, u, k, v."""
    w, u, k, v = bi_wkv_inputs(batch, tokens, channels, dtype, device, **kwargs)
    generator = torch.Generator('cpu').manual_seed(kwargs.get('seed', 0) + 1)
    gy = torch.randn(v.shape, generator=generator).to(v)
    return [gy, *(t.detach() for t in (w, u, k, v))]


def stream(gy, w, u, k, v):
    return torch.ops.linvis_cuda.bi_wkv_stream_bwd(gy, w, u, k, v)


def assert_equal(actual, expected):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert torch.equal(a, e), name


def exactly(inputs):
    """The gradients in float64, of the same rounded inputs."""
    gy, *exact = [t.double() for t in inputs]
    batch, tokens, channels = gy.shape
    if batch * tokens**2 * channels > 2**26:  # then the other form of it, equal in float64
        return bi_wkv_backward(gy, *exact)
    exact = [t.requires_grad_() for t in exact]
    return gradients(bi_wkv(*exact, backend='reference'), exact, gy)


def check(inputs, zero=(), ordinary=False):
    """The kernel against the definition in float64.

    Beside ordinary inputs the gradients by w and u, which are float32, are judged as such: with 10
    times the floor, as in test_bi_wkv_gpu.py. Where few tokens dominate, rounding is left of them.
    """
    dtype = inputs[-1].dtype
    expected = exactly(inputs)
    actual = stream(*inputs)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.is_contiguous()
        assert a.dtype == (dtype if name in ('dk', 'dv') else torch.float32)
        if name in zero:
            torch.testing.assert_close(a.double(), e, rtol=0, atol=1e-5)
        else:
            floor = 10 * FLOORS[a.dtype] if ordinary and a.dtype != dtype else FLOORS[dtype]
            assert_matches(name, a, e, None, a.dtype, floor=floor)
    return actual


# T around a row, a segment and the longest sequence of the kernel for short ones
@pytest.mark.parametrize(
    'tokens',
    [1, 2, 13, 14, 15, 63, 100, 195, 196, 197, 224, 225, 240, 255, 256, 257, 448, 449, 513, 1025,
     4096],
)  # fmt: skip
@pytest.mark.parametrize('channels', [8, 40, 192])
@dtypes
def test_matches_float64(dtype, channels, tokens):
    # of one token, which sees itself alone, and of two, whose distance is 1
    zero = {1: ('dw', 'du', 'dk'), 2: ('dw',)}.get(tokens, ())
    check(inputs_of(2, tokens, channels, dtype), zero, ordinary=True)


@pytest.mark.parametrize(
    ('batch', 'tokens', 'channels'),
    [(300, 196, 64), (100, 300, 64), (40, 2049, 64), (3, 16384, 96), (1, 29000, 96)],
)
def test_several_items_for_every_thread_block(batch, tokens, channels):
    check(inputs_of(batch, tokens, channels), ordinary=True)


def test_more_elements_than_32_bits_can_count():
    free, _ = torch.cuda.mem_get_info()
    if free < 60 * 2**30:
        pytest.skip(f'needs 60 GiB of GPU memory, {free / 2**30:.0f} are free')
    gy, w, u, k, v = inputs_of(1, 16384, 8)
    _, _, dk, dv = stream(gy, w, u, k, v)
    gy, k, v = (x.repeat(17, 1, 1025) for x in (gy, k, v))
    assert k.numel() > 2**31
    result = stream(gy, w.repeat(1025), u.repeat(1025), k, v)
    for actual, expected in zip(result[2:], (dk, dv), strict=True):
        for each in actual:
            for i in (0, 1024):
                assert torch.equal(each.view(16384, 1025, 8)[:, i], expected[0])


def change_keys(k, where, by):
    if by == 'none':
        k[:, where] = -torch.inf
    else:
        k[:, where] += by


@pytest.mark.parametrize('by', [-200.0, -60.0, -33.0, -30.0, 30.0, 33.0, 60.0, 200.0, 'none'])
@pytest.mark.parametrize(
    'where',
    [slice(40, None), slice(300, None), slice(300, 310), slice(0, 224), slice(350, 351)],
    ids=str,
)
@dtypes
def test_keys_that_jump(dtype, where, by):
    inputs = inputs_of(2, 700, 40, dtype)
    # and channels that compute as ever, beside them and in a tile of their own
    change_keys(inputs[3][..., :13], where, by)
    check(inputs)


@pytest.mark.parametrize('by', [-60.0, 60.0, 'none'])
@pytest.mark.parametrize('where', [slice(98, 99), slice(50, None), slice(14, 28)], ids=str)
@dtypes
def test_keys_that_jump_in_short_sequences(dtype, where, by):
    inputs = inputs_of(2, 196, 40, dtype)
    change_keys(inputs[3][..., :13], where, by)
    check(inputs)


@pytest.mark.parametrize('tokens', [196, 700])
def test_a_channel_out_of_range_touches_its_tile_in_its_sequence_alone(tokens):
    inputs = inputs_of(3, tokens, 72)
    expected = stream(*inputs)
    inputs[3][1, 20, 40] += 200.0
    actual = stream(*inputs)
    for a, e in zip(actual[2:], expected[2:], strict=True):
        same = torch.ones(a.shape, dtype=torch.bool, device=a.device)
        same[1, :, 32:64] = False
        assert torch.equal(a[same], e[same])
        assert not torch.equal(a[1, :, 40], e[1, :, 40])


@pytest.mark.parametrize('tokens', [150, 600])
def test_keys_of_any_size(tokens):
    check(inputs_of(2, tokens, 16, key_scale=20.0))


@pytest.mark.parametrize('decay', [0.0, 0.1, 1.0, 1.25, 1.3, 3.0, 30.0])
@pytest.mark.parametrize('tokens', [150, 600])
@dtypes
def test_decays(dtype, tokens, decay):
    check(inputs_of(2, tokens, 16, dtype, decay=decay))


@pytest.mark.parametrize('bonus', [-30.0, -19.0, 19.0, 30.0])
@pytest.mark.parametrize('tokens', [6, 600])
def test_large_bonus_of_either_sign(tokens, bonus):
    inputs = inputs_of(2, tokens, 16)
    inputs[2][:13] = bonus
    check(inputs)


@pytest.mark.parametrize('power', [-110, -100, -66, -33, 33, 100])
@pytest.mark.parametrize('which', [0, 4], ids=['gradients', 'values'])
@pytest.mark.parametrize('tokens', [196, 600])
def test_gradients_and_values_of_any_size(tokens, which, power):
    scale = 2.0**power
    inputs = inputs_of(2, tokens, 16)
    expected = exactly(inputs)
    inputs[which] *= scale
    actual = stream(*inputs)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        size = 1.0 if which == 4 and name == 'dv' else scale
        assert_matches(name, a.double() / size, e, None, torch.bfloat16)


@pytest.mark.parametrize('which', [0, 4], ids=['gradients', 'values'])
@pytest.mark.parametrize('tokens', [196, 600])
def test_gradients_and_values_that_are_zero(tokens, which):
    inputs = inputs_of(2, tokens, 16)
    inputs[which][1] = 0.0
    actual = check(inputs)
    assert not actual[2][1].any()
    inputs[which][:] = 0.0
    for name, a in zip(NAMES, stream(*inputs), strict=True):
        assert a.any() == (which == 4 and name == 'dv')


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
@pytest.mark.parametrize('which', [0, 3, 4], ids=['gradients', 'keys', 'values'])
@pytest.mark.parametrize('at', [0, 300, 599])
@pytest.mark.parametrize('tokens', [196, 600])
def test_what_is_no_number_stays_in_its_channel(tokens, at, which, value):
    inputs = inputs_of(2, tokens, 40)
    before = stream(*inputs)
    inputs[which][1, at % tokens, 5] = value
    changed = stream(*inputs)
    for name, a, e in zip(NAMES, changed, before, strict=True):
        others = [c for c in range(40) if c != 5]
        assert a[..., others].isfinite().all(), name
        # the gradient by v does not depend on v
        assert a[..., 5].isfinite().all() == (which == 4 and name == 'dv'), name
        if name in ('dk', 'dv'):
            assert torch.equal(a[0], e[0])
            assert torch.equal(a[1, :, 32:], e[1, :, 32:])


@pytest.mark.parametrize('which', [1, 2])
def test_decay_or_bonus_that_is_no_number(which):
    inputs = inputs_of(2, 600, 40)
    before = stream(*inputs)
    inputs[which][5] = torch.nan
    for a, e in zip(stream(*inputs), before, strict=True):
        assert a[..., 5].isnan().all()
        assert a[..., 6:].isfinite().all()
        assert torch.equal(a[..., 32:], e[..., 32:])


@pytest.mark.parametrize('tokens', [196, 600])
def test_rows_of_larger_tensors(tokens):
    gy, w, u, k, v = inputs_of(4, tokens, 40)
    expected = stream(gy, w, u, k, v)
    three = torch.cat([gy, k, v], -1).chunk(3, -1)
    assert_equal(stream(three[0], w, u, *three[1:]), expected)
    three = torch.stack([gy, k, v]).transpose(1, 2).contiguous().transpose(1, 2)
    assert_equal(stream(three[0], w, u, *three[1:]), expected)
    first = [x[:1].expand(4, -1, -1) for x in (gy, k, v)]
    repeated = [x.contiguous() for x in first]
    assert_equal(stream(first[0], w, u, *first[1:]), stream(repeated[0], w, u, *repeated[1:]))


@pytest.mark.parametrize('size', [(128, 196, 192), (16, 1030, 192), (2, 4200, 768)])
def test_repeated_runs_are_bit_identical(size):
    inputs = inputs_of(*size)
    inputs[3][0, size[1] // 2 :, :40] += 60.0
    expected = stream(*inputs)
    for _ in range(20):
        assert_equal(stream(*inputs), expected)


@pytest.mark.parametrize('tokens', [196, 220, 1030])
def test_in_a_cuda_graph(tokens):
    inputs = inputs_of(16, tokens, 192)
    stream(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = stream(*inputs)
    for seed in (1, 2, 3):
        others = inputs_of(16, tokens, 192, seed=seed)
        if seed == 2:
            others[3][0, 50] += 200.0
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
        graph.replay()
        assert_equal(results, stream(*others))


@pytest.mark.parametrize('tokens', [196, 1030])
def test_on_side_streams_at_once(tokens):
    inputs = [inputs_of(16, tokens, 192, seed=seed) for seed in range(4)]
    expected = [stream(*each) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    results = [[] for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(10):
        for side, each, result in zip(streams, inputs, results, strict=True):
            with torch.cuda.stream(side):
                result.append(torch.ops.linvis_cuda.bi_wkv_stream_bwd(*each))
    torch.cuda.synchronize()
    for one, result in zip(expected, results, strict=True):
        for each in result:
            assert_equal(each, one)


def test_beside_other_work():
    # thread blocks that wait for one another must get a place on the GPU all the same
    inputs = inputs_of(16, 1030, 192)
    expected = stream(*inputs)
    a = torch.randn(4096, 4096, device='cuda')
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(30):
            a = a @ a * 1e-3
    for _ in range(10):
        assert_equal(stream(*inputs), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_on_a_gpu_that_is_not_the_current_one():
    inputs = inputs_of(2, 600, 16)
    there = stream(*(t.to('cuda:1') for t in inputs))
    assert there[0].device == torch.device('cuda:1')
    assert_equal([t.cpu() for t in there], [t.cpu() for t in stream(*inputs)])


@pytest.mark.parametrize('backend', ['auto', 'cuda'])
@pytest.mark.parametrize('tokens', [196, 600])
def test_it_is_what_runs_backward(tokens, backend):
    gy, *inputs = inputs_of(2, tokens, 16)
    assert cuda.streams(*inputs[2:], gy)
    expected = stream(gy, *inputs)
    inputs = [t.requires_grad_() for t in inputs]
    assert_equal(gradients(bi_wkv(*inputs, backend=backend), inputs, gy), expected)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda x: x[..., 4:12], 'rows of whole 16 bytes'),
        (lambda x: x[..., :12], 'rows of whole 16 bytes'),
        (lambda x: x[..., :8].float(), 'takes float16 and bfloat16, got Float'),
        (lambda x: x[:1, :1, :8].expand(1, 2**20, 8), 'tokens on this GPU'),
    ],
)
def test_what_it_cannot_take_is_refused(change, message):
    gy, w, u, k, v = inputs_of(2, 20, 16)
    gy, k, v = (change(x) for x in (gy, k, v))
    c = v.shape[2]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.linvis_cuda.bi_wkv_stream_bwd(gy, w[:c], u[:c], k, v)

"""The streaming CUDA kernel of Bi-WKV's forward pass, on a GPU."""

import pytest
import torch

from linvis_ops import bi_wkv
from linvis_ops.bi_wkv import cuda
from linvis_ops.testing import assert_matches, bi_wkv_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.extension_error() is not None, reason=str(cuda.extension_error())),
]
DTYPES = {'f16': torch.float16, 'bf16': torch.bfloat16}
dtypes = pytest.mark.parametrize('dtype', DTYPES.values(), ids=DTYPES)


def inputs_of(batch, tokens, channels, dtype=torch.bfloat16, device='cuda', **kwargs):
    inputs = bi_wkv_inputs(batch, tokens, channels, dtype, device, **kwargs)
    return [t.detach() for t in inputs]


def stream(w, u, k, v):
    return torch.ops.linvis_cuda.bi_wkv_stream_fwd(w, u, k, v)


def check(inputs):
    """The kernel against the definition in float64, of the same rounded inputs."""
    exact = [t.double() for t in inputs]
    batch, tokens, channels = inputs[3].shape
    dtype = inputs[3].dtype
    large = batch * tokens**2 * channels > 2**25  # then the other form of it, equal in float64
    expected = bi_wkv(*exact, backend='torch' if large else 'reference')
    y = stream(*inputs)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_matches('y', y, expected, None, dtype)
    return y


# T around a row, a segment and the longest sequence of the kernel for short ones
@pytest.mark.parametrize(
    'tokens',
    [1, 2, 13, 14, 15, 63, 64, 195, 196, 197, 212, 255, 256, 257, 272, 511, 512, 513, 1025, 4200],
)
@pytest.mark.parametrize('channels', [8, 40, 192])
@dtypes
def test_matches_float64(dtype, channels, tokens):
    check(inputs_of(2, tokens, channels, dtype))


@pytest.mark.parametrize(
    ('batch', 'tokens', 'channels'),
    [(300, 196, 64), (100, 300, 64), (40, 2049, 64), (3, 16384, 96), (1, 30000, 96)],
)
def test_several_items_for_every_thread_block(batch, tokens, channels):
    check(inputs_of(batch, tokens, channels))


def test_more_elements_than_32_bits_can_count():
    free, _ = torch.cuda.mem_get_info()
    if free < 40 * 2**30:
        pytest.skip(f'needs 40 GiB of GPU memory, {free / 2**30:.0f} are free')
    w, u, k, v = inputs_of(1, 16384, 8)
    expected = stream(w, u, k, v)
    k, v = (x.repeat(17, 1, 1025) for x in (k, v))
    assert k.numel() > 2**31
    y = stream(w.repeat(1025), u.repeat(1025), k, v)
    assert all(
        torch.equal(each.view(16384, 1025, 8)[:, i], expected[0]) for each in y for i in (0, 1024)
    )


def change_keys(k, where, by):
    if by == 'none':
        k[:, where] = -torch.inf
    else:
        k[:, where] += by


@pytest.mark.parametrize('by', [-200.0, -60.0, -30.0, 30.0, 60.0, 200.0, 'none'])
@pytest.mark.parametrize(
    'where',
    [slice(40, None), slice(300, None), slice(300, 310), slice(0, 256), slice(350, 351)],
    ids=str,
)
@dtypes
def test_keys_that_jump(dtype, where, by):
    inputs = inputs_of(2, 700, 16, dtype)
    # and channels that compute as ever
    change_keys(inputs[2][..., :13], where, by)
    check(inputs)


@pytest.mark.parametrize('by', [-60.0, 60.0, 'none'])
@pytest.mark.parametrize('where', [slice(98, 99), slice(50, None), slice(14, 28)], ids=str)
@dtypes
def test_keys_that_jump_in_short_sequences(dtype, where, by):
    inputs = inputs_of(2, 196, 16, dtype)
    change_keys(inputs[2][..., :13], where, by)
    check(inputs)


@pytest.mark.parametrize('scale', [20.0, 100.0])
@pytest.mark.parametrize('tokens', [150, 600])
def test_keys_of_any_size(tokens, scale):
    check(inputs_of(2, tokens, 16, key_scale=scale))


@pytest.mark.parametrize('decay', [0.0, 0.1, 1.0, 1.25, 1.3, 3.0, 30.0])
@pytest.mark.parametrize('tokens', [150, 600])
@dtypes
def test_decays(dtype, tokens, decay):
    check(inputs_of(2, tokens, 16, dtype, decay=decay))


@pytest.mark.parametrize('bonus', [-30.0, -19.0, 19.0, 30.0])
@pytest.mark.parametrize('tokens', [1, 6, 600])
def test_large_bonus_of_either_sign(tokens, bonus):
    inputs = inputs_of(2, tokens, 16)
    inputs[1][:13] = bonus
    check(inputs)


def test_values_beside_which_weights_overflow():
    w, u, k, v = inputs_of(2, 600, 16)
    k[:, :20] += 30.0
    check([w, u, k, v * 1e30])


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
@pytest.mark.parametrize('which', [2, 3])
@pytest.mark.parametrize('at', [0, 150, 299, 300, 599])
@pytest.mark.parametrize('tokens', [196, 600])
def test_what_is_no_number_stays_in_its_channel(tokens, at, which, value):
    inputs = inputs_of(2, tokens, 16)
    y = stream(*inputs)
    inputs[which][1, at % tokens, 5] = value
    changed = stream(*inputs)
    assert not changed[1, :, 5].isfinite().any()
    assert value == torch.inf or changed[1, :, 5].isnan().all()
    changed[1, :, 5] = y[1, :, 5]
    assert torch.equal(changed, y)


@pytest.mark.parametrize('which', [0, 1])
def test_decay_or_bonus_that_is_no_number(which):
    inputs = inputs_of(2, 600, 16)
    y = stream(*inputs)
    inputs[which][5] = torch.nan
    changed = stream(*inputs)
    assert changed[..., 5].isnan().all()
    changed[..., 5] = y[..., 5]
    assert torch.equal(changed, y)


@pytest.mark.parametrize('tokens', [196, 600])
def test_outputs_that_overflow_within_a_row_are_computed_again(tokens):
    # two tokens whose large values cancel in all sums, but not beside the bonus
    w, u, k, v = inputs_of(1, tokens, 8)
    w.zero_()
    u.fill_(19.9)
    k.zero_()
    k[:, 4:6] = 60.0
    v[:, 4] = 2.0**40
    v[:, 5] = -(2.0**40)
    expected = bi_wkv(w.double(), u.double(), k.double(), v.double(), backend='reference')
    assert_matches('y', stream(w, u, k, v), expected, None, k.dtype)


def test_keys_that_are_all_none():
    inputs = inputs_of(1, 600, 8)
    inputs[2][:] = -torch.inf
    assert stream(*inputs).isnan().all()


@pytest.mark.parametrize('tokens', [196, 600])
def test_rows_of_larger_tensors(tokens):
    w, u, k, v = inputs_of(4, tokens, 40)
    expected = stream(w, u, k, v)
    both = torch.cat([k, v], -1)
    assert torch.equal(stream(w, u, *both.chunk(2, -1)), expected)
    by_token = torch.stack([k, v]).transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(stream(w, u, *by_token), expected)
    first = [x[:1].expand(4, -1, -1) for x in (k, v)]
    assert torch.equal(stream(w, u, *first), expected[:1].expand(4, -1, -1))


@pytest.mark.parametrize('size', [(128, 196, 192), (16, 1030, 192), (2, 4200, 768)])
def test_repeated_runs_are_bit_identical(size):
    inputs = inputs_of(*size)
    inputs[2][0, size[1] // 2 :] += 60.0
    y = stream(*inputs)
    for _ in range(20):
        assert torch.equal(stream(*inputs), y)


@pytest.mark.parametrize('tokens', [196, 250, 1030])
def test_in_a_cuda_graph(tokens):
    inputs = inputs_of(16, tokens, 192)
    stream(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = stream(*inputs)
    for seed in (1, 2, 3):
        others = inputs_of(16, tokens, 192, seed=seed)
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
        graph.replay()
        assert torch.equal(y, stream(*others))


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
                result.append(torch.ops.linvis_cuda.bi_wkv_stream_fwd(*each))
    torch.cuda.synchronize()
    for y, result in zip(expected, results, strict=True):
        assert all(torch.equal(each, y) for each in result)


def test_beside_other_work():
    # thread blocks that wait for one another must get a place on the GPU all the same
    inputs = inputs_of(16, 1030, 192)
    y = stream(*inputs)
    a = torch.randn(4096, 4096, device='cuda')
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(30):
            a = a @ a * 1e-3
    assert all(torch.equal(stream(*inputs), y) for _ in range(10))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_on_a_gpu_that_is_not_the_current_one():
    inputs = inputs_of(2, 600, 16)
    y = stream(*(t.to('cuda:1') for t in inputs))
    assert y.device == torch.device('cuda:1')
    assert torch.equal(y.cpu(), stream(*inputs).cpu())


@pytest.mark.parametrize('tokens', [196, 600])
def test_it_is_what_runs_forward(tokens):
    inputs = inputs_of(2, tokens, 16)
    assert cuda.streams(inputs[2], inputs[3])
    y = stream(*inputs)
    assert torch.equal(bi_wkv(*inputs), y)
    assert torch.equal(bi_wkv(*inputs, backend='cuda'), y)


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
    w, u, k, v = inputs_of(2, 20, 16)
    k, v = change(k), change(v)
    c = v.shape[2]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.linvis_cuda.bi_wkv_stream_fwd(w[:c], u[:c], k, v)

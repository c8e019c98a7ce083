import math

import pytest
import torch

from linvis_ops.ms_deform_attn import ms_deform_attn

SHAPES = [(3, 5), (2, 2), (1, 4)]
STARTS = [0, 15, 19]


def inputs(batch=2, queries=4, heads=2, width=3, points=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    value = uniform(batch, 23, heads, width) - 0.5
    # beyond [0, 1] as well: points outside of the maps read zeros
    locations = 1.4 * uniform(batch, queries, heads, len(SHAPES), points, 2) - 0.2
    weights = uniform(batch, queries, heads, len(SHAPES), points)
    return value.to(dtype), locations.to(dtype), weights.to(dtype)


def by_loops(value, shapes, starts, locations, weights):
    """The definition of README.md, one scalar at a time."""
    batch, _, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    out = torch.zeros(batch, queries, heads, width, dtype=torch.float64)
    for b, q, h, p in (
        (b, q, h, p)
        for b in range(batch)
        for q in range(queries)
        for h in range(heads)
        for p in range(points)
    ):
        for l, ((rows, columns), start) in enumerate(zip(shapes, starts, strict=True)):
            x, y = locations[b, q, h, l, p].tolist()
            u, v = x * columns - 0.5, y * rows - 0.5
            for i in (math.floor(v), math.floor(v) + 1):
                for j in (math.floor(u), math.floor(u) + 1):
                    if 0 <= i < rows and 0 <= j < columns:
                        share = (1 - abs(v - i)) * (1 - abs(u - j)) * weights[b, q, h, l, p]
                        out[b, q, h] += share * value[b, start + i * columns + j, h]
    return out.flatten(2)


def test_ms_deform_attn_equals_explicit_loops():
    value, locations, weights = inputs()
    expected = by_loops(value, SHAPES, STARTS, locations, weights)
    actual = ms_deform_attn(value, SHAPES, STARTS, locations, weights)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_ms_deform_attn_reads_levels_where_level_start_index_says():
    value, locations, weights = inputs()
    starts = [8, 4, 0]  # another order than that of the shapes
    expected = by_loops(value, SHAPES, starts, locations, weights)
    actual = ms_deform_attn(value, SHAPES, starts, locations, weights)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_ms_deform_attn_at_a_pixel_centre_returns_the_pixel():
    value = torch.arange(12.0).view(1, 12, 1, 1)
    rows, columns = 3, 4
    centres = torch.tensor(
        [[(j + 0.5) / columns, (i + 0.5) / rows] for i in range(rows) for j in range(columns)]
    )
    out = ms_deform_attn(
        value, [(rows, columns)], [0], centres.view(1, 12, 1, 1, 1, 2), torch.ones(1, 12, 1, 1, 1)
    )
    torch.testing.assert_close(out.flatten(), value.flatten())


def test_ms_deform_attn_gradients_pass_gradcheck():
    value, locations, weights = inputs(batch=1, queries=2, width=2)
    arguments = [tensor.requires_grad_() for tensor in (value, locations, weights)]

    def call(value, locations, weights):
        return ms_deform_attn(value, SHAPES, STARTS, locations, weights)

    assert torch.autograd.gradcheck(call, arguments)


def test_ms_deform_attn_takes_tensors_and_lists_alike():
    value, locations, weights = inputs()
    expected = ms_deform_attn(value, SHAPES, STARTS, locations, weights)
    actual = ms_deform_attn(value, torch.tensor(SHAPES), torch.tensor(STARTS), locations, weights)
    assert torch.equal(actual, expected)


def test_ms_deform_attn_takes_strided_inputs():
    value, locations, weights = inputs()
    strided = [
        tensor.transpose(0, 1).contiguous().transpose(0, 1)
        for tensor in (value, locations, weights)
    ]
    assert not any(tensor.is_contiguous() for tensor in strided)
    actual = ms_deform_attn(strided[0], SHAPES, STARTS, *strided[1:])
    assert torch.equal(actual, ms_deform_attn(value, SHAPES, STARTS, locations, weights))
    assert actual.is_contiguous()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_ms_deform_attn_rounds_half_precision_once(dtype):
    value, locations, weights = inputs(dtype=dtype)
    exact = ms_deform_attn(value.float(), SHAPES, STARTS, locations.float(), weights.float())
    actual = ms_deform_attn(value, SHAPES, STARTS, locations, weights)
    assert actual.dtype == dtype
    assert torch.equal(actual, exact.to(dtype))


def test_ms_deform_attn_keeps_float32_locations_beside_a_half_precision_value():
    value, locations, weights = inputs(dtype=torch.float32)
    half = value.bfloat16()
    exact = ms_deform_attn(half.float(), SHAPES, STARTS, locations, weights)
    actual = ms_deform_attn(half, SHAPES, STARTS, locations, weights)
    assert torch.equal(actual, exact.bfloat16())


def test_ms_deform_attn_under_autocast_equals_without():
    value, locations, weights = inputs(dtype=torch.float32)
    expected = ms_deform_attn(value, SHAPES, STARTS, locations, weights)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        actual = ms_deform_attn(value, SHAPES, STARTS, locations, weights)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(('batch', 'queries'), [(0, 4), (2, 0)], ids=['no-batch', 'no-queries'])
def test_ms_deform_attn_of_nothing_is_empty(batch, queries):
    value, locations, weights = inputs(batch=batch, queries=queries)
    value.requires_grad_()
    out = ms_deform_attn(value, SHAPES, STARTS, locations, weights)
    assert out.shape == (batch, queries, 6)
    out.sum().backward()
    assert not value.grad.any()


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        ({'value': lambda v: v.int()}, TypeError, r'value must be float16.*got torch\.int32\.'),
        ({'value': lambda v: v[0]}, ValueError, r'value must be \(B, S, H, K\).*got \(23, 2, 3\)'),
        ({'value': lambda v: v[:, :, :1]}, ValueError, r'H = 1 as in value'),
        ({'value': lambda v: v[:, :22]}, ValueError, r'1 x 4 pixels starting at 19.* 22 positions'),
        ({'shapes': lambda _: SHAPES[:2]}, ValueError, r'L = 2 as in spatial_shapes'),
        ({'shapes': lambda _: []}, ValueError, r'at least one level, got \[\]'),
        ({'shapes': lambda _: [(3, 5), (2, 2), (0, 4)]}, ValueError, r'0 x 4 pixels'),
        (
            {'shapes': lambda _: [(3.0, 5), (2, 2), (1, 4)]},
            TypeError,
            r'spatial_shapes must hold int',
        ),
        ({'starts': lambda _: [0, 15]}, ValueError, r'got 2 entries for 3 levels'),
        (
            {'starts': lambda _: torch.zeros(3, 1).int()},
            ValueError,
            r'one dimension, got shape \(3, 1\)',
        ),
        ({'locations': lambda x: x[..., :1]}, ValueError, r'sampling_locations must be'),
        ({'weights': lambda a: a[..., :1]}, ValueError, r'attention_weights must have the shape'),
    ],
)
def test_ms_deform_attn_names_the_argument_that_is_wrong(change, error, message):
    value, locations, weights = inputs()
    arguments = {
        'value': value,
        'shapes': SHAPES,
        'starts': STARTS,
        'locations': locations,
        'weights': weights,
    }
    for name, function in change.items():
        arguments[name] = function(arguments[name])
    with pytest.raises(error, match=message):
        ms_deform_attn(*arguments.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_ms_deform_attn_on_cuda_equals_the_cpu(dtype):
    value, locations, weights = inputs(dtype=dtype)
    arguments = [tensor.cuda() for tensor in (value, locations, weights)]
    actual = ms_deform_attn(arguments[0], SHAPES, torch.tensor(STARTS).cuda(), *arguments[1:])
    expected = ms_deform_attn(value, SHAPES, STARTS, locations, weights)
    torch.testing.assert_close(actual.cpu(), expected)

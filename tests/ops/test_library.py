"""Calls of operators: the short way of eager code and the way through PyTorch's dispatcher."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import linvis_ops
from benchmarks import registry
from linvis_ops import _library
from linvis_ops._library import Operator, without_autocast


@pytest.fixture(scope='module')
def scaled_sums():
    """An operator with a list of tensors among its arguments, and a list of outputs."""

    def function(x: Tensor, ys: list[Tensor], factor: float) -> list[Tensor]:
        return [x * y * factor for y in ys]

    operator = Operator('test_scaled_sums', function)

    @operator.register_fake
    def _(x, ys, factor):
        return [x.new_empty(x.shape) for _ in ys]

    def setup_context(ctx, inputs, output):
        x, ys, ctx.factor = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *ys)

    def backward(ctx, grads):
        x, *ys = ctx.saved_tensors
        grads = [torch.zeros_like(x) if g is None else g for g in grads]
        by_x = sum(g * y * ctx.factor for g, y in zip(grads, ys, strict=True))
        return by_x, [g * x * ctx.factor for g in grads], None

    operator.register_autograd(backward, setup_context=setup_context)
    return operator


@pytest.fixture
def through_dispatcher(monkeypatch):
    """How often an operator was called through the dispatcher."""
    calls = []

    def count(operator):
        definition = operator.definition

        class Counting:
            def __call__(self, *args):
                calls.append(args)
                return definition(*args)

            def __getattr__(self, name):
                return getattr(definition, name)

        monkeypatch.setattr(operator, 'definition', Counting())
        return calls

    return count


def leaves(*sizes):
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


@pytest.mark.parametrize('count', [1, 2])
def test_both_ways_give_the_same(scaled_sums, through_dispatcher, count):
    x, *ys = leaves(*[3] * (count + 1))
    calls = through_dispatcher(scaled_sums)

    def results(call):
        outputs = call(x, ys, 2.0)
        assert isinstance(outputs, list)
        return *outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), [x, *ys])

    short = results(scaled_sums)
    assert not calls
    for actual, expected in zip(short, results(scaled_sums.definition), strict=True):
        assert torch.equal(actual, expected)
    assert torch.autograd.gradcheck(lambda x, *ys: tuple(scaled_sums(x, list(ys), 2.0)), (x, *ys))


def test_outputs_without_a_gradient_count_as_zero(scaled_sums):
    x, y, z = leaves(3, 3, 3)
    by_y, by_z = torch.autograd.grad(scaled_sums(x, [y, z], 1.0)[0].sum(), (y, z))
    assert torch.equal(by_y, x)
    assert not by_z.any()


def test_no_gradient_is_kept_where_none_is_wanted(scaled_sums, through_dispatcher):
    calls = through_dispatcher(scaled_sums)
    x, y = leaves(3, 3)
    with torch.no_grad():
        assert not scaled_sums(x, [y], 1.0)[0].requires_grad
    assert not scaled_sums(x.detach(), [y.detach()], 1.0)[0].requires_grad
    assert not calls


def test_what_looks_at_operators_sees_them(scaled_sums, through_dispatcher):
    calls = through_dispatcher(scaled_sums)
    x, y = leaves(3, 3)

    def call(x, y):
        return scaled_sums(x, [y], 1.0)[0]

    with FlopCounterMode(display=False):
        call(x, y)
    assert len(calls) == 1
    torch.jit.trace(call, (x.detach(), y.detach()), check_trace=False)
    assert len(calls) == 2
    assert call(x.to('meta'), y.to('meta')).is_meta
    assert len(calls) == 3
    with torch._subclasses.FakeTensorMode() as mode:
        fake = call(*map(mode.from_tensor, (x, y)))
    assert isinstance(fake, torch._subclasses.FakeTensor)
    assert len(calls) == 4
    # a gradient by what the operator does not see
    by_x = torch.func.grad(lambda x: (x * call(y.detach(), y.detach())).sum())(x.detach())
    torch.testing.assert_close(by_x, y.detach().square())
    assert len(calls) == 5


def test_what_stands_for_a_tensor_goes_through_the_dispatcher(scaled_sums, through_dispatcher):
    calls = through_dispatcher(scaled_sums)

    def call(x, y):
        return scaled_sums(x, [y], 1.0)[0]

    class Subclass(Tensor):
        pass

    x, y = (t.detach() for t in leaves(3, 3))
    mode = torch._subclasses.FakeTensorMode()
    assert isinstance(call(*map(mode.from_tensor, (x, y))), torch._subclasses.FakeTensor)
    assert len(calls) == 1
    call(x.as_subclass(Subclass), y)
    assert len(calls) == 2
    graph = make_fx(call, tracing_mode='real', pre_dispatch=True)(x, y)
    assert 'test_scaled_sums' in graph.code
    assert len(calls) == 3


def test_profiles_and_graphs_name_the_operator(scaled_sums):
    x, y = leaves(3, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scaled_sums(x, [y], 1.0)
    assert 'linvis::test_scaled_sums' in {event.name for event in profile.events()}
    assert type(scaled_sums(x, [y], 1.0)[0].grad_fn).__name__ == 'linvis_test_scaled_sumsBackward'


def test_compilers_see_the_operator(scaled_sums):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    x, y = leaves(3, 3)
    with torch.no_grad():
        torch.compile(lambda x, y: scaled_sums(x, [y], 1.0)[0], backend=backend, fullgraph=True)(
            x, y
        )
    assert 'test_scaled_sums' in graphs[0].code


def case_of(name):
    """Inputs of an operator, and a function of the first one and the backend."""
    (operator,) = registry.named([name])
    sizes = (2, 3, 8) if len(operator.axes) == 3 else (2, 3, 2, 8) if 'C' in operator.axes else None
    shape = operator.shape(sizes or (2, 6, 2, 4, 4))
    inputs = tuple(x.detach() for x in operator.inputs(shape, torch.float32, 'cpu'))
    function = getattr(linvis_ops, operator.function)

    def run(x, backend):
        y = function(*operator.arguments((x, *inputs[1:]), shape), backend=backend)
        return y if isinstance(y, torch.Tensor) else y[0]

    return inputs, run


@pytest.mark.parametrize('name', ['bi_wkv', 'bi_gla', 'retention', 'q_shift_mix'])
@pytest.mark.parametrize('watched', [False, True])
def test_second_derivatives_are_refused_with_the_remedy(name, watched):
    (x, *_), run = case_of(name)
    x.requires_grad_()

    def second(backend):
        with FlopCounterMode(display=False) if watched else nullcontext():
            (gradient,) = torch.autograd.grad(run(x, backend).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)

    sentence = rf"^{name} has no derivative of a derivative .* backend='reference', .* any order\.$"
    with pytest.raises(NotImplementedError, match=sentence):
        second('torch')
    second('reference')


def test_shift_has_derivatives_of_any_order():
    (x, *_), run = case_of('q_shift')
    assert torch.autograd.gradgradcheck(lambda x: run(x, 'torch'), x.double().requires_grad_())


@pytest.mark.parametrize('name', ['bi_wkv', 'bi_gla', 'retention', 'q_shift', 'q_shift_mix'])
def test_functional_gradients_are_refused_with_the_remedy(name):
    (x, *_), run = case_of(name)
    sentence = rf"^{name} has no derivative by torch\.func .* backend='reference', .* any order\.$"
    total = lambda x, backend='torch': run(x, backend).square().sum()  # noqa: E731
    for transformed, given in (
        (torch.func.grad(total), x),
        (torch.func.jacrev(total), x),
        (torch.func.grad(lambda x: torch.func.vmap(total)(x).sum()), x[None]),
        (torch.func.vmap(torch.func.grad(total)), x[None]),
    ):
        with pytest.raises(NotImplementedError, match=sentence):
            transformed(given)
    assert torch.func.grad(lambda x: total(x, 'reference'))(x).abs().max() > 0

    def weighted(x):  # by numbers of which no gradient is wanted
        with torch.no_grad():
            weights = total(x)
        return (x * weights).sum()

    assert torch.equal(torch.func.grad(weighted)(x), total(x).detach().expand_as(x))


@pytest.mark.parametrize('name', ['bi_wkv', 'bi_gla', 'retention', 'q_shift', 'q_shift_mix'])
def test_tangents_are_refused_and_not_dropped(name):
    """PyTorch gives an operator without a derivative in forward mode the tangent zero."""
    inputs, run = case_of(name)
    tangent = torch.randn_like(inputs[0])
    sentence = rf"^{name} has no derivative in .* backend='reference', .* any order\.$"
    for backend in ('auto', 'torch'):
        with pytest.raises(NotImplementedError, match=sentence):
            torch.func.jvp(lambda x, b=backend: run(x, b), inputs[:1], (tangent,))
        with forward_ad.dual_level():
            assert run(inputs[0], backend).shape == run(inputs[0], 'reference').shape
            with pytest.raises(NotImplementedError, match='forward mode'):
                run(forward_ad.make_dual(inputs[0], tangent), backend)
    _, of_reference = torch.func.jvp(lambda x: run(x, 'reference'), inputs[:1], (tangent,))
    assert of_reference.abs().max() > 0


def test_checkpointing_works(scaled_sums):
    x, y = leaves(3, 3)
    out = torch.utils.checkpoint.checkpoint(
        lambda x, y: scaled_sums(x, [y], 3.0)[0], x, y, use_reentrant=False
    )
    (by_x,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(by_x, 3 * y)


def test_lists_are_put_back():
    args = (1, [2, 3], 'a', [], (4,))
    flat, lengths = _library._flatten(args)
    assert flat == [1, 2, 3, 'a', 4]
    assert _library._unflatten(flat, lengths) == (1, [2, 3], 'a', [], [4])
    flat, lengths = _library._flatten((1, None))
    assert flat == [1, None]
    assert _library._unflatten(flat, lengths) == (1, None)


def test_autocast_is_off_inside_and_on_again_behind():
    x = torch.ones(2, 2)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        with without_autocast(x):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
        with pytest.raises(ZeroDivisionError), without_autocast(x):
            1 / 0  # noqa: B018
        assert torch.is_autocast_enabled('cpu')
    with without_autocast(x):
        assert not torch.is_autocast_enabled('cpu')

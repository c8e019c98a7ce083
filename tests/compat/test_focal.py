import pytest
import torch
from mmcv.ops import sigmoid_focal_loss, softmax_focal_loss

TARGET = torch.tensor([0, 2, 3, 1, 3])  # 3 is background
WEIGHT = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)


def logits(dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(5, 3, generator=generator, dtype=torch.float64)).to(dtype)


def sigmoid_by_loops(x, target, gamma, alpha, weight):
    rows = []
    for n, label in enumerate(target.tolist()):
        row = []
        for c in range(x.shape[1]):
            p = 1 / (1 + torch.exp(-x[n, c]))
            if c == label:
                loss = -alpha * (1 - p) ** gamma * torch.log(p)
            else:
                loss = -(1 - alpha) * p**gamma * torch.log(1 - p)
            known = weight is not None and label < len(weight)
            row.append(loss * (weight[label] if known else 1))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def softmax_by_loops(x, target, gamma, alpha, weight):
    losses = []
    for n, label in enumerate(target.tolist()):
        if label < 0:
            losses.append(0 * x[n, 0])
            continue
        p = torch.exp(x[n, label]) / torch.exp(x[n]).sum()
        factor = alpha * (1 if weight is None else weight[label])
        losses.append(-factor * (1 - p) ** gamma * torch.log(p))
    return torch.stack(losses)


@pytest.mark.parametrize('weight', [None, WEIGHT], ids=['plain', 'weighted'])
@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_sigmoid_focal_loss_and_gradient_equal_the_definition(weight, gamma):
    x, plain = logits().requires_grad_(), logits().requires_grad_()
    actual = sigmoid_focal_loss(x, TARGET, gamma, 0.25, weight, 'none')
    expected = sigmoid_by_loops(plain, TARGET, gamma, 0.25, weight)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.rand_like(actual)
    actual.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('weight', [None, WEIGHT], ids=['plain', 'weighted'])
@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_softmax_focal_loss_and_gradient_equal_the_definition(weight, gamma):
    target = torch.tensor([0, 2, -1, 1, 2])
    x, plain = logits().requires_grad_(), logits().requires_grad_()
    actual = softmax_focal_loss(x, target, gamma, 0.25, weight, 'mean')
    expected = softmax_by_loops(plain, target, gamma, 0.25, weight).mean()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    actual.backward()
    expected.backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('loss', [sigmoid_focal_loss, softmax_focal_loss])
@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_focal_losses_of_extreme_logits_are_finite(loss, gamma):
    x = torch.tensor([[200.0, -200, 0], [-200, 200, 0]], requires_grad=True)
    out = loss(x, torch.tensor([0, 0]), gamma, 0.25, None, 'sum')
    out.backward()
    assert out.isfinite()
    assert x.grad.isfinite().all()


def test_sigmoid_focal_loss_of_a_large_wrong_logit_is_linear():
    x = torch.tensor([[-300.0]], requires_grad=True)
    out = sigmoid_focal_loss(x, torch.tensor([0]), 2.0, 0.25, None, 'sum')
    out.backward()
    torch.testing.assert_close(out, torch.tensor(75.0))
    torch.testing.assert_close(x.grad, torch.tensor([[-0.25]]))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_sigmoid_focal_loss_rounds_half_precision_once(dtype):
    x = logits(dtype).requires_grad_()
    exact_x = x.detach().float().requires_grad_()
    actual = sigmoid_focal_loss(x, TARGET, 2.0, 0.25, None, 'none')
    exact = sigmoid_focal_loss(exact_x, TARGET, 2.0, 0.25, None, 'none')
    assert actual.dtype == dtype
    assert torch.equal(actual, exact.to(dtype))
    actual.sum().backward()
    exact.sum().backward()
    assert torch.equal(x.grad, exact_x.grad.to(dtype))


@pytest.mark.parametrize('loss', [sigmoid_focal_loss, softmax_focal_loss])
def test_focal_losses_of_no_samples_are_zero(loss):
    x = torch.zeros(0, 3, requires_grad=True)
    out = loss(x, torch.zeros(0, dtype=torch.long), 2.0, 0.25, None, 'sum')
    out.backward()
    assert out == 0
    assert x.grad.shape == (0, 3)

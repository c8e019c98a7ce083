"""The stand-ins on a CUDA device give what they give on the CPU."""

import pytest
import torch
from mmcv.ops import batched_nms, nms, nms_match, roi_align, sigmoid_focal_loss, soft_nms
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def half(dtype):
    """Dtype of an autocast in which tensors of this dtype occur."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float16


def random_boxes(dtype=torch.float32, count=200):
    generator = torch.Generator().manual_seed(0)
    corner = (100 * torch.rand(count, 2, generator=generator)).round()
    size = (5 + 40 * torch.rand(count, 2, generator=generator)).round()
    scores = torch.randperm(count, generator=generator).to(dtype) / 256
    return torch.cat([corner, corner + size], 1).to(dtype), scores


@pytest.mark.parametrize('dtype', DTYPES)
def test_nms_family_on_cuda(dtype):
    boxes, scores = random_boxes(dtype)
    classes = torch.arange(len(scores)) % 4
    on_cuda = boxes.cuda(), scores.cuda()
    kept = nms(*on_cuda, 0.5)[1]
    assert kept.is_cuda
    assert torch.equal(kept.cpu(), nms(boxes, scores, 0.5)[1])
    config = {'type': 'nms', 'iou_threshold': 0.5}
    with torch.autocast('cuda', dtype=half(dtype)):
        kept = batched_nms(*on_cuda, classes.cuda(), config)[1]
    assert torch.equal(kept.cpu(), batched_nms(boxes, scores, classes, config)[1])
    for method in ('naive', 'linear', 'gaussian'):
        dets, taken = soft_nms(*on_cuda, method=method)
        expected, expected_taken = soft_nms(boxes, scores, method=method)
        assert dets.is_cuda
        assert torch.equal(taken.cpu(), expected_taken)
        assert torch.equal(dets.cpu(), expected)
    dets = torch.cat([boxes, scores[:, None]], 1)
    groups = [group.tolist() for group in nms_match(dets.cuda(), 0.5)]
    assert groups == [group.tolist() for group in nms_match(dets, 0.5)]


def roi_inputs(dtype, device):
    x = torch.rand(2, 8, 24, 32, generator=torch.Generator().manual_seed(0))
    boxes = random_boxes(count=32)[0] / 4
    rois = torch.cat([(torch.arange(32.0) % 2)[:, None], boxes], 1)
    return x.to(device, dtype).requires_grad_(), rois.to(device, dtype)


@pytest.mark.parametrize('autocast', [False, True], ids=['plain', 'autocast'])
@pytest.mark.parametrize('dtype', DTYPES)
def test_roi_align_on_cuda(dtype, autocast):
    x, rois = roi_inputs(dtype, 'cpu')
    expected = roi_align(x, rois, 7, 0.5, 0)
    expected.sum().backward()
    cuda_x, cuda_rois = roi_inputs(dtype, 'cuda')
    with torch.autocast('cuda', dtype=half(dtype), enabled=autocast):
        actual = roi_align(cuda_x, cuda_rois, 7, 0.5, 0)
        actual.sum().backward()
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.cpu(), expected)
    torch.testing.assert_close(cuda_x.grad.cpu(), x.grad)


def test_roi_align_on_cuda_trains_under_deterministic_algorithms():
    x, rois = roi_inputs(torch.float32, 'cpu')
    roi_align(x, rois, 7, 0.5, 0).sum().backward()
    cuda_x, cuda_rois = roi_inputs(torch.float32, 'cuda')
    torch.use_deterministic_algorithms(True)
    try:
        roi_align(cuda_x, cuda_rois, 7, 0.5, 0).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(cuda_x.grad.cpu(), x.grad)


@pytest.mark.parametrize('dtype', DTYPES)
def test_sigmoid_focal_loss_on_cuda(dtype):
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(64, 10, generator=generator)).to(dtype).requires_grad_()
    target = torch.randint(0, 11, (64,), generator=generator)
    cuda_x = x.detach().cuda().requires_grad_()
    expected = sigmoid_focal_loss(x, target, 2.0, 0.25, None, 'none')
    with torch.autocast('cuda', dtype=half(dtype)):
        actual = sigmoid_focal_loss(cuda_x, target.cuda(), 2.0, 0.25, None, 'none')
    expected.sum().backward()
    actual.sum().backward()
    torch.testing.assert_close(actual.cpu(), expected)
    torch.testing.assert_close(cuda_x.grad.cpu(), x.grad)


def test_ms_deform_attn_of_mmcv_on_cuda_under_autocast():
    generator = torch.Generator().manual_seed(0)
    shapes, starts = torch.tensor([[6, 8], [3, 4]]), torch.tensor([0, 48])
    value = torch.rand(2, 60, 2, 8, generator=generator).half()
    locations = torch.rand(2, 9, 2, 2, 4, 2, generator=generator)
    weights = torch.rand(2, 9, 2, 2, 4, generator=generator)
    outputs, gradients = [], []
    for device in ('cpu', 'cuda'):
        v, x, a = (t.to(device, copy=True).requires_grad_() for t in (value, locations, weights))
        with torch.autocast(device, dtype=torch.float16):
            out = MultiScaleDeformableAttnFunction.apply(
                v, shapes.to(device), starts.to(device), x, a, 64
            )
        out.float().sum().backward()
        outputs.append(out.cpu())
        gradients.append([t.grad.cpu() for t in (v, x, a)])
    assert outputs[1].dtype == torch.float16
    torch.testing.assert_close(outputs[1], outputs[0])
    for actual, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)

"""ViR over pictures that come in bands of rows."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from linvis.models import ViR
from linvis.models.backbones import vir_stream
from linvis.models.layers import resize_position_embedding
from linvis.models.layers.position import resize_position_embedding_rows
from linvis.models.layers.retention import StreamState

ARCH = {'embed_dims': 16, 'depth': 2, 'num_heads': 2}


def randomised(module: nn.Module) -> nn.Module:
    """Parameters that are far from their initial values, of which some are zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.5, 0.5)
    return module


@pytest.mark.parametrize('out_type', ['featmap', 'raw', 'avg_featmap', 'cls_token'])
@pytest.mark.parametrize(('decay', 'head_norm'), [('1d', False), ('2d', False), ('2d', True)])
@pytest.mark.parametrize('heights', [[40], [16, 24], [16, 16, 8], [32, 3]])
def test_bands_give_the_features_of_the_whole(decay, head_norm, out_type, heights):
    backbone = randomised(
        ViR(
            ARCH,
            retention=decay,
            head_norm=head_norm,
            img_size=64,
            patch_size=8,
            out_type=out_type,
            out_indices=(0, 1),
        )
    )
    assert ('blocks.0.retention.head_norm.weight' in backbone.state_dict()) == head_norm
    images = torch.randn(2, 3, sum(heights), 28)
    expected = backbone(images)
    bands = list(backbone.stream(iter(images.split(heights, dim=2)), images.shape[2]))
    joined = bands[0]
    if out_type in ('featmap', 'raw'):
        assert len(bands) == len(heights)
        along = 2 if out_type == 'featmap' else 1
        joined = [torch.cat(parts, along) for parts in zip(*bands, strict=True)]
    for a, e in zip(joined, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
        assert not a.requires_grad


class Calls(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.__name__.split('.')[0]] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('decay', ['1d', '2d'])
def test_bands_run_by_the_operator_in_as_many_calls_whatever_their_height(decay):
    backbone = ViR(ARCH, retention=decay, img_size=64, patch_size=8, backend='torch')
    numbers = []
    for rows in (1, 40):
        images = torch.randn(1, 3, 3 * 8 * rows, 160)
        parts = backbone.stream(images.split(8 * rows, dim=2), images.shape[2])
        next(parts)  # before it there is no state
        with Calls() as calls:
            next(parts)
        assert calls.names['retention_fwd'] == ARCH['depth']
        numbers.append(calls.names.total())
    assert numbers[0] == numbers[1]


def test_backend_of_the_layers_is_that_of_bands():
    backbone = ViR(ARCH, img_size=64, patch_size=8, backend='reference')
    with Calls() as calls:
        list(backbone.stream([torch.randn(1, 3, 16, 16)], 16))
    assert 'retention_fwd' not in calls.names


def test_rows_of_the_position_embedding():
    pos_embed = torch.randn(1, 4 * 5, 3)
    for target in ((4, 5), (4, 9), (11, 5), (9, 2)):
        whole = resize_position_embedding(pos_embed, (4, 5), target).unflatten(1, target)
        for rows in (range(2), range(1, target[0])):
            part = resize_position_embedding_rows(pos_embed, (4, 5), target, rows)
            torch.testing.assert_close(part, whole[:, rows.start : rows.stop].flatten(1, 2))


@pytest.mark.parametrize(
    ('shapes', 'height', 'message'),
    [
        ([(8, 16), (10, 16), (6, 16)], 24, 'must have a multiple of 8 rows of pixels, got 10'),
        ([(8, 16), (8, 24)], 16, r'of the first one, \(1, 16\), got \(1, 24\)'),
        ([(8, 16), (16, 16)], 16, 'have 24 rows of pixels or more, the picture 16'),
        ([(8, 16), (8, 16)], 24, 'have 16 rows of pixels in all, not 24'),
    ],
)
def test_bands_that_are_no_picture_are_refused(shapes, height, message):
    backbone = ViR(ARCH, img_size=64, patch_size=8)
    bands = [torch.zeros(1, 3, *shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        list(backbone.stream(bands, height))


@pytest.mark.parametrize('height', [0, 8.0])
def test_height_that_is_no_number_of_rows_is_refused(height):
    with pytest.raises(ValueError, match='height must be a number of rows from 1 on, got'):
        ViR(ARCH).stream([], height)


def test_bands_that_are_no_pictures_are_refused():
    with pytest.raises(ValueError, match=r'ViR takes pictures \(B, 3, H, W\)'):
        list(ViR(ARCH).stream([torch.zeros(3, 16, 16)], 16))


def test_bidirectional_backbone_cannot_be_streamed():
    backbone = ViR(ARCH, direction='bidirectional')
    with pytest.raises(ValueError, match="stream needs direction='causal'"):
        backbone.stream([], 16)


class StandIn:
    """Stands in for CUDA graphs on a CPU.

    As with a graph, what is captured is not run by that, and each replay fills the same tensors.
    """

    def __init__(self, monkeypatch):
        self.captured = self.replayed = 0
        self.fixed = []
        fix = StreamState.fix

        def fix_and_note(state):
            fix(state)
            self.fixed.append(state.value)

        monkeypatch.setattr(StreamState, 'fix', fix_and_note)
        monkeypatch.setattr(vir_stream, 'captured', self.capture)
        monkeypatch.setattr(vir_stream, 'check_gpu', lambda device: None)

    def capture(self, launch, device):
        assert device.type == 'cpu'
        before = [value.clone() for value in self.fixed]
        outputs = launch()
        for value, old in zip(self.fixed, before, strict=True):
            value.copy_(old)
        for output in outputs:
            output.fill_(torch.nan)

        def replay():
            with torch.inference_mode():  # a graph asks for no mode
                for output, new in zip(outputs, launch(), strict=True):
                    output.copy_(new)
            self.replayed += 1

        self.captured += 1
        return outputs, replay


@pytest.mark.parametrize('out_type', ['featmap', 'raw', 'avg_featmap', 'cls_token'])
@pytest.mark.parametrize('decay', ['1d', '2d'])
@pytest.mark.parametrize(
    ('heights', 'replayed'),
    [
        ([8] * 5, 2),  # the last one has the class token, too
        ([16, 8, 8, 8, 3], 2),
        ([8, 8, 8, 16, 16, 8, 8], 2),  # others are launched by the host, in between as well
        ([8, 16, 8, 16, 8], 0),
        ([8, 8], 0),
    ],
)
def test_graph_of_bands_gives_the_features_of_the_whole(
    monkeypatch, heights, replayed, decay, out_type
):
    graphs = StandIn(monkeypatch)
    backbone = randomised(
        ViR(ARCH, retention=decay, img_size=64, patch_size=8, out_type=out_type, out_indices=(0, 1))
    )
    images = torch.randn(2, 3, sum(heights), 28)
    expected = backbone(images)
    bands = backbone.stream(images.split(heights, dim=2), images.shape[2], cuda_graph=True)
    joined, *more = list(bands)
    if more:
        along = 2 if out_type == 'featmap' else 1
        joined = [torch.cat(parts, along) for parts in zip(joined, *more, strict=True)]
    for a, e in zip(joined, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    assert (graphs.captured, graphs.replayed) == (min(replayed, 1), replayed)


def test_graph_can_be_made_in_one_inference_mode_and_used_outside(monkeypatch):
    StandIn(monkeypatch)
    backbone = randomised(ViR(ARCH, img_size=64, patch_size=8))
    images = torch.randn(1, 3, 48, 24)
    bands = backbone.stream(images.split(8, dim=2), 48, cuda_graph=True)
    with torch.inference_mode():
        parts = [next(bands)[0] for _ in range(3)]
    parts += [part for (part,) in bands]
    torch.testing.assert_close(torch.cat(parts, 2), backbone(images)[0], rtol=1e-4, atol=1e-4)


def test_autocast_that_begins_or_ends_between_bands_is_followed(monkeypatch):
    graphs = StandIn(monkeypatch)
    enabled = []
    monkeypatch.setattr(vir_stream, 'autocast_of', lambda: enabled[-1])
    backbone = randomised(ViR(ARCH, img_size=64, patch_size=8))
    bands = backbone.stream(torch.randn(1, 3, 64, 24).split(8, dim=2), 64, cuda_graph=True)
    replayed = []
    for autocast in (None, None, None, torch.bfloat16, torch.bfloat16, None, None, None):
        enabled.append(autocast)
        next(bands)
        replayed.append(graphs.replayed)
    # the last band has the class token
    assert replayed == [0, 0, 1, 1, 1, 2, 3, 3]


def test_graph_without_a_gpu_is_refused():
    backbone = ViR(ARCH, img_size=64, patch_size=8)
    with pytest.raises(ValueError, match='cuda_graph=True needs bands on a CUDA GPU, got cpu'):
        next(backbone.stream([torch.zeros(1, 3, 16, 16)], 16, cuda_graph=True))


@pytest.mark.gpu
def test_graph_on_a_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip('needs two GPUs')
    backbone = randomised(ViR(ARCH, img_size=64, patch_size=8)).to('cuda:1')
    images = torch.randn(1, 3, 320, 120, device='cuda:1')
    parts = [
        torch.cat([x for (x,) in backbone.stream(images.split(64, dim=2), 320, cuda_graph=on)], 2)
        for on in (False, True)
    ]
    assert torch.equal(*parts)


@pytest.mark.gpu
@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'autocast'])
@pytest.mark.parametrize('decay', ['1d', '2d'])
@pytest.mark.parametrize('heights', [[64] * 5, [32, 64, 64, 64, 32, 64, 20]])
def test_graph_on_a_gpu_changes_no_feature(heights, decay, precision):
    arch = {'embed_dims': 64, 'depth': 3, 'num_heads': 2}
    backbone = randomised(
        ViR(arch, retention=decay, img_size=64, patch_size=8, out_type='raw', out_indices=(0, 2))
    ).cuda()
    images = torch.randn(2, 3, sum(heights), 120, device='cuda')
    if precision == 'bfloat16':
        backbone, images = backbone.bfloat16(), images.bfloat16()
    outputs = []
    for cuda_graph in (False, True):
        with torch.autocast('cuda', torch.bfloat16, enabled=precision == 'autocast'):
            bands = images.split(heights, dim=2)
            parts = list(backbone.stream(bands, images.shape[2], cuda_graph=cuda_graph))
        outputs.append([torch.cat(each, 1) for each in zip(*parts, strict=True)])
    for a, e in zip(*outputs, strict=True):
        assert e.isfinite().all()
        assert torch.equal(a, e)

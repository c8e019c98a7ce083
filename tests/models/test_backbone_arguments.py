"""Arguments and weights that a backbone refuses."""

from pathlib import Path

import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader, load_from_local

from linvis.models import VRWKV
from linvis.utils.checkpoint import CheckpointError

ARCH = {'embed_dims': 24, 'depth': 3}


class Payload:
    """What a checkpoint from somewhere may hold: unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_weights_that_hold_code_are_refused_outside_the_tools_too(tmp_path):
    file, trace = tmp_path / 'weights.pth', tmp_path / 'trace'
    torch.save({'state_dict': {'pos_embed': Payload(trace)}}, file)
    CheckpointLoader.register_scheme('', load_from_local, force=True)  # as mmengine has it
    backbone = VRWKV(ARCH, init_cfg={'type': 'Pretrained', 'checkpoint': str(file)})
    with pytest.raises(CheckpointError):
        backbone.init_weights()
    assert not trace.exists()


def test_wrong_arguments_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"out_type must be one of .*, got 'cls_token'\."):
        VRWKV(ARCH, out_type='cls_token')
    with pytest.raises(ValueError, match=r'frozen_stages must be in -1\.\.3, got 4\.'):
        VRWKV(ARCH, frozen_stages=4)
    with pytest.raises(ValueError, match=r'frozen_stages must be in -1\.\.3, got 1\.5\.'):
        VRWKV(ARCH, frozen_stages=1.5)
    for arch in (None, 3, 'huge'):
        with pytest.raises(ValueError, match=rf'arch must be one of tiny, .* got {arch!r}\.'):
            VRWKV(arch)

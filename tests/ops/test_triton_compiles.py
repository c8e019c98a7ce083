"""Every Triton kernel compiles for the GPUs it is meant for; needs no GPU."""

from unittest import mock

import pytest
import torch

from linvis_ops._triton import interpreting
from linvis_ops.testing import bi_wkv_inputs

triton = pytest.importorskip('triton')
pytestmark = pytest.mark.skipif(interpreting(), reason='the interpreter compiles nothing')


@pytest.fixture(params=[80, 90], ids=['sm_80', 'sm_90'])
def compiled(request, monkeypatch, tmp_path):
    """Launches compile for a GPU that is not there and run nothing; yields the kernels' names."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    driver = mock.MagicMock()
    driver.get_current_target.return_value = GPUTarget('cuda', request.param, 32)
    driver.get_current_device.return_value = 0
    driver.get_current_stream.return_value = 0
    monkeypatch.setattr(triton.runtime.driver, '_active', driver)
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    names = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm['cubin']
        names.append(self.__name__)

    monkeypatch.setattr(JITFunction, 'run', compile_only)
    monkeypatch.setattr('triton.knobs.runtime.interpret', False)
    return names


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
def test_bi_wkv(compiled, dtype):
    from linvis_ops.bi_wkv import kernels_triton

    w, u, k, v = (t.detach() for t in bi_wkv_inputs(2, 40, 32, dtype))
    kernels_triton.bi_wkv_forward(w, u, k, v)
    kernels_triton.bi_wkv_backward(v, w, u, k, v)
    assert set(compiled) == {
        'bi_wkv_summary_kernel',
        'bi_wkv_scan_kernel',
        'bi_wkv_fwd_kernel',
        'bi_wkv_bwd_kernel',
    }


def test_q_shift(compiled):
    from linvis_ops.q_shift import kernels_triton

    kernels_triton.q_shift(torch.zeros(2, 12, 32), 3, 4, adjoint=False)
    assert compiled == ['q_shift_kernel']

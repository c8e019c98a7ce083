"""Every Triton kernel compiles for the GPUs it is meant for; needs no GPU."""

import re
import subprocess
from unittest import mock

import pytest
import torch

from linvis_ops._triton import interpreting
from linvis_ops.testing import bi_gla_inputs, bi_wkv_inputs, retention_inputs

triton = pytest.importorskip('triton')
pytestmark = pytest.mark.skipif(interpreting(), reason='the interpreter compiles nothing')


@pytest.fixture(params=[80, 90], ids=['sm_80', 'sm_90'])
def compiled(request, monkeypatch, tmp_path):
    """Launches compile for a GPU that is not there and run nothing; yields the kernels' names."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    driver = mock.MagicMock()
    driver.get_current_target.return_value = GPUTarget('cuda', request.param, 32)
    # Triton keeps compiled kernels by device
    driver.get_current_device.return_value = request.param
    driver.get_current_stream.return_value = 0
    monkeypatch.setattr(triton.runtime.driver, '_active', driver)
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    names = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm['cubin']
        names.append(self.__name__)
        return kernel

    monkeypatch.setattr(JITFunction, 'run', compile_only)
    monkeypatch.setattr('triton.knobs.runtime.interpret', False)
    return names


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
def test_bi_wkv(compiled, dtype):
    from linvis_ops.bi_wkv import kernels_triton, kernels_triton_backward
    from linvis_ops.bi_wkv.launch import Launch

    w, u, k, v = (t.detach() for t in bi_wkv_inputs(2, 40, 32, dtype))
    launch = Launch(length=8, blocks=1, lanes=5, group=2, channels=32, warps=1)
    kernels_triton.bi_wkv_forward(w, u, k, v, launch)
    kernels_triton_backward.bi_wkv_backward(v, w, u, k, v, launch)
    assert set(compiled) == {
        'bi_wkv_lane_kernel',
        'bi_wkv_group_kernel',
        'bi_wkv_out_kernel',
        'bi_wkv_adjoint_kernel',
        'bi_wkv_gradient_kernel',
        'sum_rows_kernel',
    }


def test_bi_wkv_compiles_once_for_all_batches_and_lengths(kernels, monkeypatch):
    from linvis_ops.bi_wkv import kernels_triton, kernels_triton_backward, launch

    rules = dict.fromkeys(('fwd', 'bwd'), launch.Rule(length=4))  # compiles faster than more
    monkeypatch.setattr(launch, 'rules_of', lambda device: (rules, 132))
    launches = []
    for batch, tokens in ((1, 1), (2, 196), (128, 196), (2, 1024), (1, 4096)):
        inputs = [t.detach() for t in bi_wkv_inputs(batch, tokens, 64, torch.bfloat16)]
        launches.append(launch.launch_for(inputs[3], 'bwd'))
        kernels_triton.bi_wkv_forward(*inputs)
        kernels_triton_backward.bi_wkv_backward(inputs[3], *inputs)
    assert {each.group < each.lanes for each in launches} == {True, False}
    variants = {(name, kernel.hash) for name, kernel in kernels if name != 'sum_rows_kernel'}
    assert len(variants) == len({name for name, _ in variants}) == 5


@pytest.mark.parametrize(('segments', 'gates'), [(1, torch.float32), (2, torch.bfloat16)])
def test_bi_gla(compiled, segments, gates):
    from linvis_ops._chunks import Launch
    from linvis_ops.bi_gla import kernels_triton, kernels_triton_backward

    inputs = bi_gla_inputs(2, 60, 3, 32, 64, torch.bfloat16, gate_dtype=gates)
    inputs = [t.detach() for t in inputs]
    launch = Launch(32, chunks=2, segment=2 // segments, segments=segments, keys=32, values=64)
    kernels_triton.bi_gla_forward(*inputs, launch=launch)
    kernels_triton_backward.bi_gla_backward(inputs[2], *inputs, launch=launch)
    names = ('weights', 'out', 'state', 'gradient', 'by_tokens')
    names += ('sum', 'scan') if segments > 1 else ()
    assert set(compiled) == {f'bi_gla_{name}_kernel' for name in names}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['f32', 'f16'])
def test_bi_gla_in_other_dtypes(compiled, dtype):
    from linvis_ops._chunks import Launch
    from linvis_ops.bi_gla import kernels_triton, kernels_triton_backward

    inputs = [t.detach() for t in bi_gla_inputs(1, 30, 1, 16, 20, dtype)]
    launch = Launch(16, chunks=2, segment=2, segments=1, keys=16, values=32)
    kernels_triton.bi_gla_forward(*inputs, launch=launch)
    kernels_triton_backward.bi_gla_backward(inputs[2], *inputs, launch=launch)
    # matrices, outputs, flagged chunks; matrices, states, gradients, flagged chunks
    assert len(compiled) == 3 + 4


def test_q_shift(compiled):
    from linvis_ops.q_shift import kernels_triton

    kernels_triton.q_shift(torch.zeros(2, 12, 32), 3, 4, heads=1, adjoint=False)
    assert compiled == ['q_shift_kernel']


def launch_layer_norm(tokens, channels, dtype, of=torch.float32, centred=True):
    from linvis_ops.layer_norm import kernels_triton

    x, weight = torch.zeros(tokens, channels, dtype=dtype), torch.zeros(channels)
    y = kernels_triton.layer_norm_forward(x, weight, weight if centred else None, 1e-6, centred, of)
    kernels_triton.layer_norm_backward(y, x, weight, 1e-6, centred)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
def test_layer_norm(compiled, dtype):
    for channels, centred in ((7, True), (1000, False)):
        launch_layer_norm(5, channels, dtype, centred=centred)
    assert (
        compiled
        == [f'{name}_kernel' for name in ('layer_norm_fwd', 'layer_norm_bwd', 'sum_rows')] * 2
    )


@pytest.mark.parametrize('channels', [32, 96, 768])
def test_layer_norm_moves_16_bytes_at_a_time(kernels, channels):
    launch_layer_norm(300, channels, torch.bfloat16, torch.bfloat16)
    for name, kernel in kernels[:2]:
        lines = kernel.asm['ptx'].splitlines()
        wide = [line for line in lines if '.global' in line and '.v4.b32' in line]
        assert [line for line in wide if 'ld.' in line], name
        assert [line for line in wide if 'st.' in line], name
        assert not any('.global.b16' in line for line in lines), name


def test_layer_norm_compiles_once_for_all_sizes(kernels):
    for tokens in (1, 40, 3136, 50_000):
        launch_layer_norm(tokens, 32, torch.bfloat16)
    variants = {(name, kernel.hash) for name, kernel in kernels}
    assert len(variants) == len({name for name, _ in variants}) == 3


@pytest.fixture
def kernels(compiled, monkeypatch):
    """Pairs of name and compiled kernel of all launches."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run
    pairs = []

    def keep(self, *args, **kwargs):
        pairs.append((self.__name__, launch(self, *args, **kwargs)))

    monkeypatch.setattr(JITFunction, 'run', keep)
    return pairs


def launch_q_shift_mix(rows, columns, channels, dtype, norm, *, batch=2, heads=1, class_token=0):
    """Forward, backward and plain shift of a layer with three mixes."""
    from linvis_ops.q_shift import kernels_triton as shift
    from linvis_ops.q_shift_mix import kernels_triton as mix
    from linvis_ops.q_shift_mix.kernels_triton_backward import q_shift_mix_backward

    x = torch.zeros(batch, rows * columns + class_token, channels, dtype=dtype)
    mus = [torch.zeros(channels) for _ in range(3)]
    affine = (mus[0], mus[0]) if norm else (None, None)
    *mixes, last = mix.q_shift_mix_forward(x, mus, *affine, 1e-5, rows, columns, heads, x.dtype)
    grads, stats = (mixes, last) if norm else ([*mixes, last], None)
    q_shift_mix_backward(grads, x, mus, *affine, stats, rows, columns, heads)
    shift.q_shift(x, rows, columns, heads, adjoint=False)


@pytest.mark.parametrize('norm', [False, True], ids=['plain', 'norm'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
def test_q_shift_mix(compiled, dtype, norm):
    for channels, heads, class_token in ((192, 1, 0), (192, 3, 1), (7, 1, 1)):
        launch_q_shift_mix(3, 4, channels, dtype, norm, heads=heads, class_token=class_token)
    names = {
        'q_shift_mix_fwd_kernel',
        f'q_shift_mix_{"norm_" * norm}bwd_kernel',
        'q_shift_kernel',
        'sum_rows_kernel',
    }
    assert set(compiled) == names | ({'q_shift_mix_stats_kernel'} if norm else set())


@pytest.mark.parametrize('heads', [1, 3])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['f32', 'bf16'])
def test_q_shift_mix_moves_16_bytes_at_a_time(kernels, dtype, heads):
    launch_q_shift_mix(14, 14, 192, dtype, False, heads=heads)
    for name, kernel in kernels:
        if name == 'sum_rows_kernel':
            continue
        lines = kernel.asm['ptx'].splitlines()
        loads = [line for line in lines if 'ld.global' in line]
        stores = [line for line in lines if 'st.global' in line]
        assert loads
        # of the backward pass, the three weights are loaded once by fewer threads, as are their
        # partial sums stored; what is loaded for each token is copied into shared memory
        backward = name == 'q_shift_mix_bwd_kernel'
        narrow = [line for line in loads if '.v4.b32' not in line]
        assert len(narrow) <= 3 * backward, name
        narrow = [line for line in stores if '.v4.b32' not in line]
        assert len(narrow) <= 3 * 2 * backward, name
        copies = [line for line in lines if 'cp.async.c' in line and '.shared.global' in line]
        assert bool(copies) == backward, name
        assert all(', 0x10, ' in line for line in copies), name
        if not backward:
            assert 'convert_layout' not in kernel.asm['ttgir'], name


def test_backward_of_q_shift_mix_spills_nothing(kernels, tmp_path, monkeypatch):
    from linvis_ops.q_shift_mix import kernels_triton_backward

    for channels, heads, class_token in ((192, 1, 0), (192, 3, 1), (768, 1, 0)):
        launch_q_shift_mix(
            14, 14, channels, torch.bfloat16, False, heads=heads, class_token=class_token
        )
    monkeypatch.setattr(kernels_triton_backward, 'MOST_RUNS', 2)  # several strips of a program
    launch_q_shift_mix(14, 14, 192, torch.bfloat16, False, class_token=1)
    stacks = [
        stack_of(kernel, tmp_path / 'kernel.cubin')
        for name, kernel in kernels
        if name == 'q_shift_mix_bwd_kernel'
    ]
    assert stacks == [0, 0, 0, 0]


@pytest.mark.parametrize('norm', [False, True], ids=['plain', 'norm'])
def test_q_shift_mix_compiles_once_for_all_batches_and_grids(kernels, norm):
    for batch, rows, columns in ((2, 14, 14), (1, 1, 1), (3, 1, 9), (1, 33, 2)):
        launch_q_shift_mix(rows, columns, 64, torch.bfloat16, norm, batch=batch)
    variants = {(name, kernel.hash) for name, kernel in kernels}
    assert len(variants) == len({name for name, _ in variants})


def test_bi_gla_compiles_once_for_all_batches_and_lengths(kernels):
    from linvis_ops._chunks import Rule
    from linvis_ops.bi_gla import kernels_triton
    from linvis_ops.bi_gla.launch import launch_for

    rule = Rule(length=16, at_once=16, segment=32)
    for batch, tokens in ((1, 40), (2, 33), (3, 16 * 16)):
        inputs = [t.detach() for t in bi_gla_inputs(batch, tokens, 1, 16, 16, torch.bfloat16)]
        launch = launch_for(inputs[0], inputs[2], 'fwd', rule)
        kernels_triton.bi_gla_forward(*inputs, launch=launch)
    variants = {(name, kernel.hash) for name, kernel in kernels}
    assert len(variants) == 5


def launch_retention(rule, of, dtype, key_width, value_width, *, bidirectional, tokens, batch=1):
    """One pass, divided by a rule."""
    from linvis_ops.retention import kernels_triton, kernels_triton_backward
    from linvis_ops.retention.launch import launch_for

    *inputs, log_gamma = detached(retention_inputs(batch, tokens, 1, key_width, value_width, dtype))
    division = launch_for(inputs[0], inputs[2], of, rule)
    rest = (*inputs, log_gamma, bidirectional, None, division)
    if of == 'fwd':
        kernels_triton.retention_forward(*rest)
    else:
        kernels_triton_backward.retention_backward(inputs[2], *rest)


def detached(inputs):
    return [t.detach() for t in inputs]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['f32', 'f16'])
@pytest.mark.parametrize('tokens', [30, 40])
def test_retention(compiled, tokens, dtype):
    from linvis_ops._chunks import Rule

    rule = Rule(length=16, at_once=32, segment=16)
    for of in ('fwd', 'bwd'):
        launch_retention(rule, of, dtype, 16, 20, bidirectional=tokens > 30, tokens=tokens)
    through_memory = {'retention_state_kernel', 'retention_scan_kernel'} if tokens > 32 else set()
    assert set(compiled) == {'retention_out_kernel', 'retention_gradient_kernel'} | through_memory


def test_retention_compiles_once_for_all_batches_and_lengths(kernels):
    from linvis_ops._chunks import Rule

    rule = Rule(length=16, at_once=16, segment=32)
    for batch, tokens in ((1, 40), (2, 33), (3, 16 * 16)):
        for of in ('fwd', 'bwd'):
            launch_retention(
                rule, of, torch.bfloat16, 16, 16, bidirectional=False, tokens=tokens, batch=batch
            )
    variants = {(name, kernel.hash) for name, kernel in kernels}
    # the states of the backward pass are two kinds instead of one
    assert len(variants) == 3 + 2


def stack_of(kernel, path):
    """Bytes of a thread's stack, where spilled registers are."""
    path.write_bytes(kernel.asm['cubin'])
    command = [triton.knobs.nvidia.cuobjdump.path, '-res-usage', str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r'STACK:(\d+)', text)[1])


@pytest.mark.parametrize('of', ['fwd', 'bwd'])
@pytest.mark.parametrize(
    ('key_width', 'value_width', 'dtype'),
    [(32, 64, torch.bfloat16), (64, 128, torch.bfloat16), (32, 64, torch.float16)],
)
def test_bi_gla_forms_no_warpgroups(kernels, of, key_width, value_width, dtype):
    """The assembler of Triton 3.6 miscompiles their products where registers are spilled."""
    from linvis_ops.bi_gla import kernels_triton, kernels_triton_backward

    if triton.runtime.driver.active.get_current_target().arch < 90:
        pytest.skip('the GPU has no warpgroups')
    inputs = detached(bi_gla_inputs(1, 300, 1, key_width, value_width, dtype))
    if of == 'fwd':
        kernels_triton.bi_gla_forward(*inputs)
    else:
        kernels_triton_backward.bi_gla_backward(inputs[2], *inputs)
    assert len(kernels) == (5 if of == 'fwd' else 6)
    assert not any('wgmma' in kernel.asm['ptx'] for _, kernel in kernels)


SMALL, LARGE = (torch.bfloat16, 64), (torch.bfloat16, 128)


@pytest.mark.parametrize(
    ('size', 'of', 'bidirectional'),
    [
        (SMALL, 'fwd', False),
        (SMALL, 'fwd', True),
        (SMALL, 'bwd', False),
        (SMALL, 'bwd', True),
        (LARGE, 'fwd', True),
        (LARGE, 'bwd', True),
        ((torch.float16, 64), 'bwd', True),
        ((torch.float32, 64), 'bwd', True),
        ((torch.float16, 128), 'bwd', True),
    ],
)
def test_rules_of_retention_fit_the_gpu(kernels, tmp_path, size, of, bidirectional):
    """Products of warpgroups are without spilled registers: the assembler of Triton 3.6."""
    from linvis_ops.retention.launch import RULES

    hopper = triton.runtime.driver.active.get_current_target().arch == 90
    dtype, width = size
    kind = (
        'small' if size == SMALL else 'wide' if (dtype, width) == (torch.float16, 128) else 'large'
    )
    rule = RULES.get((9, 0) if hopper else (0, 0), RULES[0, 0])[of, kind]
    launch_retention(rule, of, dtype, width, width, bidirectional=bidirectional, tokens=300)
    assert len(kernels) == 3
    for name, kernel in kernels:
        stack = stack_of(kernel, tmp_path / 'kernel.cubin')
        warpgroups = 'wgmma' in kernel.asm['ptx']
        assert not (warpgroups and stack), name
        assert stack <= 256, name
        assert kernel.metadata.shared <= (99 if size == SMALL else 227) * 1024, name


@pytest.mark.parametrize('uneven', ['width', 'stride', 'start'])
def test_retention_forms_no_warpgroups_of_uneven_rows(kernels, uneven):
    from linvis_ops.retention.kernels_triton_backward import retention_backward

    width = 48 if uneven == 'width' else 64
    *inputs, log_gamma = detached(retention_inputs(1, 300, 2, width, width, torch.bfloat16))
    q, k, v = inputs
    if uneven == 'stride':
        q = torch.nn.functional.pad(q, (0, 1))[..., :-1]
    elif uneven == 'start':
        q = torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    retention_backward(v, q, k, v, log_gamma, True)
    assert len(kernels) == 3
    assert not any('wgmma' in kernel.asm['ptx'] for _, kernel in kernels)


def launch_retention_grid(rule, of, dtype, key_width, value_width, *, bidirectional, hw, batch=1):
    """One pass over a grid with a class token, divided by a rule."""
    from linvis_ops.retention import kernels_triton_grid
    from linvis_ops.retention.launch_grid import launch_for

    rows, columns = hw
    inputs = retention_inputs(batch, rows * columns + 1, 2, key_width, value_width, dtype)
    q, k, v, log_gamma = detached(inputs)
    division = launch_for(rows + 1, columns, rule) if rule else None
    rest = (q, k, v, log_gamma, columns, bidirectional, None, division)
    if of == 'fwd':
        kernels_triton_grid.retention_forward(*rest)
    else:
        kernels_triton_grid.retention_backward(v, *rest)


def test_retention_on_grids_compiles_once_for_all_batches_and_grids(kernels):
    from linvis_ops.retention.launch_grid import GridRule

    rule = GridRule(length=16, at_once=16, tile_rows=16, tile_columns=16)
    for batch, hw in ((1, (40, 30)), (2, (33, 64)), (3, (16, 16 * 16))):
        launch_retention_grid(
            rule, 'fwd', torch.bfloat16, 16, 16, bidirectional=False, hw=hw, batch=batch
        )
    variants = {(name, kernel.hash) for name, kernel in kernels}
    assert {name for name, _ in variants} == {
        'retention_line_kernel',
        'retention_mix_kernel',
        'retention_block_kernel',
    }
    # lines are columns or rows, and tiles of up to 16 or 32 steps
    assert len(variants) <= 2 * 2 + 2 * 2 + 1


@pytest.mark.parametrize('bidirectional', [False, True], ids=['causal', 'bidirectional'])
@pytest.mark.parametrize(
    ('size', 'kind'),
    [
        (SMALL, 'small'),
        (LARGE, 'large'),
        ((torch.float16, 64), 'wide'),
        ((torch.float32, 128), 'wide'),
        ((torch.bfloat16, 48), None),
    ],
)
def test_rules_of_retention_on_grids_fit_the_gpu(kernels, tmp_path, size, kind, bidirectional):
    from linvis_ops.retention.launch_grid import RULES

    hopper = triton.runtime.driver.active.get_current_target().arch == 90
    dtype, width = size
    rule = RULES.get((9, 0) if hopper else (0, 0), RULES[0, 0])[kind] if kind else None
    launch_retention_grid(
        rule, 'bwd' if bidirectional else 'fwd', dtype, width, width, bidirectional=bidirectional,
        hw=(64, 64),
    )  # fmt: skip
    assert len(kernels) == (11 if bidirectional else 5)
    for name, kernel in kernels:
        stack = stack_of(kernel, tmp_path / 'kernel.cubin')
        warpgroups = 'wgmma' in kernel.asm['ptx']
        assert not (warpgroups and stack), name
        assert kind or not warpgroups, name
        assert stack <= 256, name
        assert kernel.metadata.shared <= (99 if size == SMALL else 227) * 1024, name

import json

import pytest
import torch

from benchmarks.timing import Timing
from tools.analysis import block_cost
from tools.analysis.block_cost import Case, Measurement, Product

# As PyTorch, its libraries, inductor and this project name kernels on a GPU.
KERNELS = {
    'nvjet_tst_128x128_64x6_2x1_v_bz_TNN': 'products',
    'sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64': 'products',
    'void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>': 'products',
    'void cublasLt::splitKreduce_kernel<32, 16, int>': 'products',
    'triton_tem_fused_mm_t_view_3': 'products',
    'bi_wkv_lane_kernel': 'bi_wkv',
    'bi_wkv_gradient_kernel': 'bi_wkv',
    'q_shift_mix_fwd_kernel': 'q_shift_mix',
    'void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>': 'layer norm',
    'void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernel<float>': 'layer norm',
    'triton_per_fused_add_native_layer_norm_q_shift_mix_fwd_0': 'layer norm',
    'triton_poi_fused_bi_wkv_fwd_mul_sigmoid_2': 'elementwise',
    'void at::native::vectorized_elementwise_kernel<8, at::native::sigmoid_kernel>': 'elementwise',
    'void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>': 'elementwise',
    'triton_red_fused_bi_wkv_bwd_sum_4': 'other',
    'void at::native::reduce_kernel<512, 1>': 'other',
    'Memset (Device)': 'other',
}

KERNEL = {'kernel': 'bi_wkv_lane_kernel', 'group': 'bi_wkv', 'calls': 1.0, 'ms': 0.5}


class StandInTimer:
    """Calls on the CPU; 2 ms as launched and 1 ms in a graph."""

    device = 'cpu'
    flush_bytes = 2**28

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def launched(self, run, repeats):
        run()
        return Timing([2.0] * repeats, graph=False, note='launched')

    def times(self, run, repeats):
        run()
        return Timing([1.0] * repeats, graph=True)

    def release(self):
        pass


@pytest.fixture
def on_a_cpu(monkeypatch):
    """The tool believes that there is a GPU, and measures on the CPU, compiling nothing."""
    compilations = []

    def stand_in(module, **options):
        compilations.append(options)
        return module

    monkeypatch.setattr('benchmarks.run.has_gpu', lambda: True)
    monkeypatch.setattr('torch.cuda.mem_get_info', lambda: (2**24, 2**24))
    monkeypatch.setattr('torch.compile', stand_in)
    monkeypatch.setattr(block_cost, 'BlockTimer', StandInTimer)
    monkeypatch.setattr(block_cost, 'profiled', lambda run: [KERNEL])
    monkeypatch.setattr(
        'benchmarks.results.make_header', lambda *_, **fields: {'gpu': 'a GPU', **fields}
    )
    return compilations


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_missing_gpu_is_told_in_one_sentence(capsys):
    assert block_cost.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ''
    assert printed.err == (
        'The cost of a block is measured on a CUDA GPU, and PyTorch finds none; '
        '`python tools/env_report.py` says what it does find.\n'
    )


@pytest.mark.parametrize('text', ['224', 'x', '224x', '0x8', '-3x4', '224x256x3', 'axb'])
def test_other_shapes_are_refused(text, capsys):
    with pytest.raises(SystemExit) as ended:
        block_cost.main([f'--shape={text}'])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert repr(text) in error
    assert error.count('\n') == 1


def test_results_that_cannot_be_written_are_told_before_a_missing_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        block_cost.main(['--out', str(tmp_path / 'nowhere' / 'cost.json')])
    assert ended.value.code == 2
    assert f'--out: there is no folder {tmp_path / "nowhere"}; make it' in capsys.readouterr().err


@pytest.mark.parametrize('commit', [None, 'abc'])
def test_files_here_say_nothing_of_a_commit_that_is_given(on_a_cpu, monkeypatch, tmp_path, commit):
    given = []
    monkeypatch.setattr(
        'benchmarks.results.make_header',
        lambda ops, command, commit, **_: given.append((command, commit)) or {'dirty': None},
    )
    monkeypatch.setattr('benchmarks.results.git', lambda *_: ' M linvis/models/vrwkv.py')
    out = tmp_path / 'cost.json'
    asked = ['--shape', '32x1', '--pass', 'fwd', '--precision', 'bfloat16', '--repeats', '2']
    options = ['--out', str(out), *(['--commit', commit] if commit else [])]
    assert block_cost.main([*asked, *options]) == 0
    assert given == [(f'python tools/analysis/block_cost.py {" ".join(asked)}', commit)]
    assert json.loads(out.read_text())['header']['dirty'] is (None if commit else True)


def test_unknown_names_are_refused(capsys):
    for option, name in (('--arch', 'tyni'), ('--precision', 'float8'), ('--pass', 'bwd')):
        with pytest.raises(SystemExit):
            block_cost.main([option, name])
        assert f"'{name}'" in capsys.readouterr().err


@pytest.mark.parametrize('kernel', KERNELS)
def test_kernels_are_grouped_by_name(kernel):
    assert block_cost.group_of(kernel) == KERNELS[kernel]


def test_groups_are_summed():
    kernels = [
        {'group': 'products', 'ms': 0.25},
        {'group': 'bi_wkv', 'ms': 1.0},
        {'group': 'products', 'ms': 0.5},
    ]
    assert list(block_cost.by_group(kernels).items()) == [('bi_wkv', 1.0), ('products', 0.75)]


def test_products_are_those_of_the_linear_layers():
    block = Case('tiny', 224, 2, 'autocast', 'fwd').block('cpu')
    forward = block_cost.products(block, 392, 'fwd')
    assert forward == {
        Product('output', 392, 192, 192): 5,
        Product('output', 392, 192, 768): 1,
        Product('output', 392, 768, 192): 1,
    }
    training = block_cost.products(block, 392, 'fwd+bwd')
    assert sum(training.values()) == 3 * sum(forward.values())
    assert training[Product('gradient of the weight', 392, 192, 768)] == 1


@pytest.mark.parametrize(
    ('kind', 'shape'),
    [
        ('output', (6, 5)),
        ('gradient of the input', (6, 4)),
        ('gradient of the weight', (5, 4)),
    ],
)
def test_products_have_the_shapes_of_their_results(kind, shape):
    product = Product(kind, tokens=6, inputs=4, outputs=5).call('cpu')()
    assert product.shape == shape
    assert product.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ('arch', 'precision', 'forward', 'both'),
    [
        # worked out by hand from docs/models/vrwkv.md, in bytes a token and channel
        ('tiny', 'bfloat16', 56, 56 + 76),
        ('tiny', 'autocast', 68, 68 + 96),
        ('small', 'bfloat16', 56, 56 + 82),
        ('base', 'autocast', 68, 68 + 98),
    ],
)
def test_least_traffic_is_that_of_the_written_list(arch, precision, forward, both):
    case = Case(arch, 224, 1, precision, 'fwd')
    block = case.block('cpu')
    elements = 10 * block_cost.channels_of(block)
    for pass_name, expected in (('fwd', forward), ('fwd+bwd', both)):
        steps = block_cost.least_traffic(block, 10, case.stream.itemsize, pass_name)
        assert sum(steps.values()) == expected * elements


@pytest.mark.parametrize('precision', block_cost.PRECISIONS)
@pytest.mark.parametrize('pass_name', block_cost.PASSES)
def test_a_pass_runs_the_block_of_the_network(precision, pass_name):
    case = Case('tiny', 40, 2, precision, pass_name)
    block = case.block('cpu')
    result = case.call(block, None, 'cpu')()
    if pass_name == 'fwd':
        assert result.shape == (2, 9, 192)
        assert result.dtype == case.stream
        assert not result.requires_grad
    else:
        grad, *grads = result
        assert grad.shape == (2, 9, 192)
        assert [one.shape for one in grads] == [one.shape for one in block.parameters()]


def test_everything_is_measured_printed_and_written(on_a_cpu, tmp_path, capsys):
    out = tmp_path / 'cost.json'
    arguments = ['--arch', 'tiny', '--shape', '32x2', '--repeats', '3', '--max-autotune']
    assert block_cost.main([*arguments, '--out', str(out)]) == 0
    compiling = {'fullgraph': True, 'dynamic': False}
    autotuning = {**compiling, 'mode': 'max-autotune-no-cudagraphs'}
    assert on_a_cpu == [compiling, autotuning] * 4
    written = json.loads(out.read_text())
    assert written['header']['copy_gb_s'] == 8.4
    cases = written['cases']
    assert [(case['precision'], case['pass_name']) for case in cases] == [
        (precision, pass_name)
        for precision in block_cost.PRECISIONS
        for pass_name in block_cost.PASSES
    ]
    case = cases[0]
    assert (case['tokens'], case['channels'], case['left_out']) == (4, 192, {})
    assert case['products_ms'] == 7
    assert case['memory_ms'] == pytest.approx(68 * 8 * 192 / 8.4e6, abs=1e-5)
    assert case['least_ms'] == pytest.approx(case['products_ms'] + case['memory_ms'])
    rows = [(row['way'], row['graph'], row['ms']) for row in case['rows']]
    assert rows == [
        (way, graph, ms)
        for way in ('eager', 'compiled', 'max-autotune')
        for graph, ms in ((False, 2.0), (True, 1.0))
    ]
    assert list(case['kernels'].items()) == [
        (way, [KERNEL]) for way in ('eager', 'compiled', 'max-autotune')
    ]
    assert case['rows'][0]['ratio'] == pytest.approx(2 / case['least_ms'], abs=1e-3)
    printed = capsys.readouterr().out
    assert printed.endswith(f'\nWrote {out}.\n')
    assert 'tiny, 2 x 4 tokens, 192 channels, autocast, fwd: products 7.0000 ms' in printed
    assert 'eager          1 kernels, ms: bi_wkv 0.5000' in printed
    assert 'max-autotune   in a graph      1.0000 ms  x 0.14' in printed


def test_what_does_not_fit_is_left_out(on_a_cpu):
    class Full(StandInTimer):
        def launched(self, run, repeats):
            raise torch.OutOfMemoryError

    measurement = Measurement(Full(), 1000.0, {'eager': None}, 3)
    entry = measurement.measure(Case('tiny', 32, 1, 'bfloat16', 'fwd'))
    assert entry['left_out'] == {'eager': 'it does not fit into memory'}
    assert 'left out: it does not fit into memory' in block_cost.text_of(entry)


@pytest.mark.gpu
def test_a_block_is_measured_on_a_gpu(tmp_path):
    out = tmp_path / 'cost.json'
    assert block_cost.main(['--shape', '64x8', '--repeats', '10', '--out', str(out)]) == 0
    for case in json.loads(out.read_text())['cases']:
        assert case['left_out'] == {}
        assert [row['graph'] for row in case['rows']] == [False, True, False, True]
        assert all(row['ms'] > 0 for row in case['rows'])
        for kernels in case['kernels'].values():
            groups = block_cost.by_group(kernels)
            assert groups['products'] > 0
            assert groups['bi_wkv'] > 0
            assert groups['q_shift_mix'] > 0

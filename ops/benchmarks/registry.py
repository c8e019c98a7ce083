"""What is measured: operators, their shapes in real networks, their least traffic, their rivals.

A new operator is one more `Operator` in OPERATORS. B batch, T tokens, C channels; rows and columns
of the token grid; H heads, K and V widths of keys and values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import linvis_ops
from benchmarks.passes import Function, Shape, tokens
from benchmarks.rivals import (
    COPY,
    FLA_GLA_STACKED,
    FLA_GLA_TWICE,
    FLA_RETENTION,
    FLA_RWKV4_TWICE,
    SDPA,
    TORCH_LAYER_NORM,
    TORCH_RMS_NORM,
    Rival,
)
from linvis_ops import testing

ROOT = Path(__file__).resolve().parents[2]
# Tests of what all operators have: execution on GPUs, and the sums of gradients of weights.
SHARED_TESTS = ('tests/ops/test_operators_on_gpu.py', 'tests/ops/test_triton_sum.py')
Inputs = tuple[Tensor, ...]
Traffic = Callable[[Shape, int], tuple[int, int]]


@dataclass(frozen=True)
class Operator:
    """One operator to measure.

    Attributes:
        name: Name of the entry.
        axes: Letters of a shape, in order.
        shapes: Shapes of real networks.
        inputs: Makes the inputs from shape, dtype and device; those that require gradients get
            them in the backward pass.
        traffic: Least bytes of the forward and of the backward pass, from shape and bytes an
            element: each input read once, each output written once, in its dtype.
        arguments: Positional arguments of the public function from inputs and shape; default: the
            inputs.
        options: Further arguments, by name.
        rivals: What it is measured beside.
        dtypes: Names of the dtypes that are measured unless others are asked for.
        public: Name in linvis_ops, of the public function and of its backends; None: that of the
            entry.
    """

    name: str
    axes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    inputs: Callable[[Shape, torch.dtype, str], Inputs]
    traffic: Traffic
    arguments: Callable[[Inputs, Shape], tuple[Any, ...]] = lambda inputs, _shape: inputs
    options: Callable[[Inputs], dict[str, Any]] = lambda _inputs: {}
    rivals: tuple[Rival, ...] = (COPY,)
    dtypes: tuple[str, ...] = ('bfloat16', 'float32')
    public: str | None = None

    @property
    def function(self) -> str:
        """Name of the public function and of its backends."""
        return self.public or self.name

    def shape(self, sizes: Sequence[int]) -> Shape:
        """Name the sizes of a shape by their axes."""
        return dict(zip(self.axes, sizes, strict=True))

    def bytes_by_pass(self, shape: Shape, dtype: torch.dtype) -> dict[str, int]:
        """Least bytes to be read and written, by pass."""
        forward, backward = self.traffic(shape, dtype.itemsize)
        return {'fwd': forward, 'bwd': backward, 'fwd+bwd': forward + backward}

    def prepare(self, shape: Shape, dtype: torch.dtype, device: str, backend: str) -> Function:
        """Our implementation on one backend, with inputs."""
        inputs = self.inputs(shape, dtype, device)
        arguments = self.arguments(inputs, shape)
        options = self.options(inputs)
        function = getattr(linvis_ops, self.function)
        with_gradient = tuple(t for t in inputs if t.requires_grad)
        return Function(lambda: function(*arguments, **options, backend=backend), with_gradient)

    def missing(self) -> str | None:
        """Why it cannot be measured with the linvis_ops that is imported, or None."""
        if hasattr(linvis_ops, self.function) and self.function in linvis_ops.operators():
            return None
        return f'linvis_ops has no operator {self.function}'

    def backends(self) -> tuple[str, ...]:
        """Names of our implementations, the preferred one first and the definition last."""
        return tuple(linvis_ops.available_backends(self.function))

    def test_files(self) -> tuple[str, ...]:
        """The tests that have to pass first, relative to the top of the checkout."""
        # test_<operator>.py and test_<operator>_<topic>.py, not those of a longer name of another
        others = [name for name in linvis_ops.operators() if name.startswith(f'{self.function}_')]
        stems = [
            path.stem for path in sorted((ROOT / 'tests/ops').glob(f'test_{self.function}*.py'))
        ]
        mine = (
            stem
            for stem in stems
            if f'{stem}_'.startswith(f'test_{self.function}_')
            and not stem.startswith(tuple(f'test_{other}' for other in others))
        )
        return *(f'tests/ops/{stem}.py' for stem in mine), *SHARED_TESTS


def elements(shape: Shape) -> int:
    """Number of elements of one tensor of tokens: B T C, or B T H V of an operator with heads."""
    channels = shape['C'] if 'C' in shape else shape['H'] * shape['V']
    return shape['B'] * tokens(shape) * channels


def token_tensors(forward: int, backward: int) -> Traffic:
    """Least traffic of an operator that moves whole tensors (B, T, C), parameters being small.

    Args:
        forward: How many it reads and writes in the forward pass.
        backward: How many in the backward pass.
    """

    def traffic(shape: Shape, itemsize: int) -> tuple[int, int]:
        size = elements(shape) * itemsize
        return forward * size, backward * size

    return traffic


def gla_traffic(shape: Shape, itemsize: int) -> tuple[int, int]:
    """Least traffic of gated linear attention with gates in the dtype of the other inputs."""
    size = shape['B'] * shape['T'] * shape['H'] * itemsize
    keys, values = shape['K'], shape['V']
    # q, k, two gates, v, o; all inputs again, the gradient by o, one gradient of each input
    return size * (4 * keys + 2 * values), size * (8 * keys + 3 * values)


def retention_traffic(shape: Shape, itemsize: int) -> tuple[int, int]:
    """Least traffic of retention; the decays of the heads are small."""
    size = shape['B'] * tokens(shape) * shape['H'] * itemsize
    keys, values = shape['K'], shape['V']
    # q, k, v, o; q, k, v again, the gradient by o, one gradient of each input
    return size * (2 * keys + 2 * values), size * (4 * keys + 3 * values)


def retention_on_grids(direction: str) -> Operator:
    """Retention on grids, in one direction."""
    return Operator(
        name=f'retention_2d_{direction}',
        public='retention',
        axes=('B', 'rows', 'columns', 'H', 'K', 'V'),
        shapes=(
            (128, 14, 14, 6, 64, 64),
            (64, 32, 32, 6, 64, 64),
            (16, 64, 64, 12, 64, 64),
            (4, 128, 128, 6, 64, 64),
        ),
        inputs=lambda s, dtype, device: testing.retention_inputs(
            s['B'], tokens(s), s['H'], s['K'], s['V'], dtype, device
        ),
        arguments=lambda inputs, s: (*inputs, (s['rows'], s['columns']), direction),
        traffic=retention_traffic,
        rivals=(*SDPA, COPY),
    )


def token_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """x, (B, T, C), which requires gradients."""
    size = shape['B'], tokens(shape), shape['C']
    return (torch.randn(size, dtype=dtype, device=device).requires_grad_(),)


def mix_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """x, (B, T, C), and the weights of three mixes, each (C,), float32."""
    mus = tuple(torch.rand(shape['C'], device=device).requires_grad_() for _ in range(3))
    return *token_inputs(shape, dtype, device), *mus


def mix_with_norm_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """As `mix_inputs`, and weight and bias of the norm in front."""
    weights = tuple(torch.rand(shape['C'], device=device).requires_grad_() for _ in range(2))
    return *mix_inputs(shape, dtype, device), *weights


def norm_inputs(shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
    """x, (B, T, C), weight and bias, each (C,), float32."""
    weights = tuple(torch.rand(shape['C'], device=device).requires_grad_() for _ in range(2))
    return *token_inputs(shape, dtype, device), *weights


OPERATORS = (
    Operator(
        name='bi_wkv',
        axes=('B', 'T', 'C'),
        shapes=(
            (128, 196, 192),
            (64, 1024, 384),
            (16, 4096, 768),
            (4, 16384, 768),
            (16, 4096, 192),
            (2, 4200, 768),
            (1, 65536, 192),
        ),
        inputs=lambda s, dtype, device: testing.bi_wkv_inputs(
            s['B'], s['T'], s['C'], dtype, device
        ),
        traffic=token_tensors(forward=3, backward=5),  # k, v, y; k, v, dy, dk, dv
        rivals=(*SDPA, FLA_RWKV4_TWICE, COPY),
    ),
    Operator(
        name='bi_gla',
        axes=('B', 'T', 'H', 'K', 'V'),
        shapes=(
            (128, 196, 3, 32, 64),
            (64, 1024, 6, 32, 64),
            (16, 4096, 3, 32, 64),
            (4, 16384, 6, 32, 64),
            (2, 4200, 12, 32, 64),
            (2, 16640, 4, 16, 32),
        ),
        inputs=lambda s, dtype, device: testing.bi_gla_inputs(
            s['B'], s['T'], s['H'], s['K'], s['V'], dtype, device
        ),
        traffic=gla_traffic,
        rivals=(*SDPA, FLA_GLA_TWICE, FLA_GLA_STACKED, COPY),
    ),
    # causal, in a sequence
    Operator(
        name='retention',
        axes=('B', 'T', 'H', 'K', 'V'),
        shapes=(
            (128, 197, 6, 64, 64),
            (64, 1024, 6, 64, 64),
            (16, 4096, 12, 64, 64),
            (4, 16384, 6, 64, 64),
        ),
        inputs=lambda s, dtype, device: testing.retention_inputs(
            s['B'], s['T'], s['H'], s['K'], s['V'], dtype, device
        ),
        traffic=retention_traffic,
        rivals=(*SDPA, FLA_RETENTION, COPY),
    ),
    retention_on_grids('causal'),
    retention_on_grids('bidirectional'),
    Operator(
        name='q_shift',
        axes=('B', 'rows', 'columns', 'C'),
        shapes=((128, 14, 14, 192), (16, 64, 64, 192)),
        inputs=token_inputs,
        arguments=lambda inputs, s: (*inputs, (s['rows'], s['columns'])),
        traffic=token_tensors(forward=2, backward=2),  # x, y; dy, dx
    ),
    Operator(
        name='q_shift_mix',
        axes=('B', 'rows', 'columns', 'C'),
        shapes=((128, 14, 14, 192), (16, 64, 64, 192)),
        inputs=mix_inputs,
        arguments=lambda inputs, s: (inputs[0], (s['rows'], s['columns']), inputs[1:]),
        traffic=token_tensors(forward=4, backward=5),  # x, three mixes; x, three gradients, dx
    ),
    Operator(
        name='q_shift_mix_norm',
        public='q_shift_mix',
        axes=('B', 'rows', 'columns', 'C'),
        shapes=((128, 14, 14, 192), (16, 64, 64, 192)),
        inputs=mix_with_norm_inputs,
        arguments=lambda inputs, s: (inputs[0], (s['rows'], s['columns']), inputs[1:4]),
        options=lambda inputs: {'norm': (*inputs[4:], 1e-6)},
        traffic=token_tensors(forward=4, backward=5),
    ),
    # heads of ViG-H's first stage
    Operator(
        name='rms_norm',
        public='layer_norm',
        axes=('B', 'T', 'C'),
        shapes=((128, 9408, 32),),
        inputs=lambda s, dtype, device: norm_inputs(s, dtype, device)[:2],
        arguments=lambda inputs, _: (*inputs, None, 1e-6, False),
        traffic=token_tensors(forward=2, backward=3),  # x, y; x, dy, dx
        rivals=(TORCH_RMS_NORM, COPY),
    ),
    # tokens of ViG-H's first stage, ViG-T, ViR-S and ViR-B, hidden channels of VRWKV-L
    Operator(
        name='layer_norm',
        axes=('B', 'T', 'C'),
        shapes=(
            (128, 3136, 96),
            (256, 196, 192),
            (64, 1025, 384),
            (32, 1025, 768),
            (16, 576, 4096),
        ),
        inputs=norm_inputs,
        traffic=token_tensors(forward=2, backward=3),  # x, y; x, dy, dx
        rivals=(TORCH_LAYER_NORM, COPY),
    ),
)


def named(names: Sequence[str]) -> list[Operator]:
    """Operators by name, in the order of the registry; all for no names.

    Raises:
        ValueError: If there is no such operator.
    """
    known = [operator.name for operator in OPERATORS]
    for name in names:
        if name not in known:
            raise ValueError(f'there is no operator {name!r}; there are {", ".join(known)}.')
    return [operator for operator in OPERATORS if not names or operator.name in names]

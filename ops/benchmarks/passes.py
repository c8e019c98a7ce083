"""What is timed of a function of tensors: its forward pass, its backward pass, both."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PASSES = ('fwd', 'bwd', 'fwd+bwd')
OPERATORS = 'linvis'  # namespace of our registered operators

Shape = dict[str, int]  # size by axis
Outputs = Tensor | tuple[Tensor, ...]


def tokens(shape: Shape) -> int:
    """T of a shape."""
    return shape['T'] if 'T' in shape else shape['rows'] * shape['columns']


class Call:
    """Something to time.

    Attributes:
        run: Does it once.
        what: Name of what runs: 'forward', 'autograd' or that of a registered operator.
    """

    def __init__(self, run: Callable[[], object], what: str) -> None:
        self.run = run
        self.what = what


class Runnable(Protocol):
    """An implementation with inputs of one shape and dtype."""

    def call(self, pass_name: str) -> Call:
        """What to time for a pass, one of PASSES."""
        ...


class Function:
    """A differentiable function with its inputs.

    Args:
        forward: Computes the output or outputs.
        inputs: The tensors that get gradients.
    """

    def __init__(self, forward: Callable[[], Outputs], inputs: tuple[Tensor, ...]) -> None:
        self.forward = forward
        self.inputs = inputs

    def call(self, pass_name: str) -> Call:
        """What to time for a pass.

        * fwd: the public function without recording of gradients, as in inference.
        * bwd: the backward pass alone. Where it consists of one registered operator of ours (and
          views), that operator, with the tensors that autograd gave to it; else the gradients by
          autograd, on a graph that is kept.
        * fwd+bwd: the public function, then all gradients by autograd, as in training.

        Args:
            pass_name: One of PASSES.

        Raises:
            ValueError: If it is none of these.
        """
        if pass_name == 'fwd':
            return Call(self._inference, 'forward')
        if pass_name == 'bwd':
            return self._backward()
        if pass_name == 'fwd+bwd':
            grads = _random_like(self._inference())
            return Call(lambda: self._gradients(self.forward(), grads), 'autograd')
        raise ValueError(f'there is no pass {pass_name!r}; there are {", ".join(PASSES)}.')

    def _inference(self) -> Outputs:
        with torch.no_grad():
            return self.forward()

    def _gradients(
        self, outputs: Outputs, grads: tuple[Tensor, ...], retain_graph: bool = False
    ) -> tuple[Tensor, ...]:
        return torch.autograd.grad(_tuple(outputs), self.inputs, grads, retain_graph=retain_graph)

    def _backward(self) -> Call:
        outputs = self.forward()
        grads = _random_like(outputs)
        with _Recorder() as recorder:
            self._gradients(outputs, grads, retain_graph=True)
        working = [call for call in recorder.calls if not call[0].is_view]
        if len(working) == 1 and working[0][0].namespace == OPERATORS:
            operator, args, kwargs = working[0]

            def run() -> object:
                with torch.no_grad():
                    return operator(*args, **kwargs)

            return Call(run, operator.name())
        return Call(lambda: self._gradients(outputs, grads, retain_graph=True), 'autograd')


class Copies:
    """A copy, for each pass, that reads and writes as many bytes as the pass has to.

    Args:
        traffic: Bytes read plus bytes written, by pass.
        device: Where the buffers are made.
    """

    def __init__(self, traffic: dict[str, int], device: str) -> None:
        self.traffic = traffic
        self.device = device

    def call(self, pass_name: str) -> Call:
        """A copy from one buffer to another."""
        size = max(self.traffic[pass_name] // 2, 1)
        source = torch.randint(256, (size,), dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        return Call(lambda: target.copy_(source), 'copy_')


def ways_to_copy(total: int, device: str) -> dict[str, Callable[[], object]]:
    """Two ways to move bytes from one buffer to another, by name.

    `copy` is `copy_`, which leaves the way to the driver. `kernel` is an element-wise kernel, the
    negative of every number, which moves data as the kernels of operators do.

    Args:
        total: Bytes read plus bytes written.
        device: Where the buffers are made.
    """
    # numbers of 4 bytes: a thread of PyTorch's element-wise kernels loads four at once, 16 bytes,
    # whereas of narrower ones only later versions load as many bytes
    count = max(total // 2 // torch.int32.itemsize, 1)
    source = torch.randint(2**31 - 1, (count,), dtype=torch.int32, device=device)
    target = torch.zeros_like(source)
    return {
        'copy': lambda: target.copy_(source),
        'kernel': lambda: torch.neg(source, out=target),
    }


class _Recorder(TorchDispatchMode):
    """Remembers the operators that run, and what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _random_like(outputs: Outputs) -> tuple[Tensor, ...]:
    return tuple(torch.randn_like(output, requires_grad=False) for output in _tuple(outputs))

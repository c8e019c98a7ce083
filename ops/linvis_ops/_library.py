"""Registration of operators under torch.ops.linvis; a name is defined once."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import forward_ad

NAMESPACE = 'linvis'

Function = TypeVar('Function', bound=Callable[..., Any])


# What an operator's arguments are in eager code, beside lists of tensors. Whatever stands for a
# tensor elsewhere (a proxy, a fake or a wrapped tensor, a symbolic number) has a type of its own.
TENSOR_TYPES = frozenset((Tensor, torch.nn.Parameter))
LIST_TYPES = frozenset((list, tuple))
OTHER_TYPES = frozenset((int, float, bool, str, type(None), torch.dtype))


def _is_watched() -> bool:
    """Whether somebody but autograd looks at calls of operators now.

    That is a compiler, tracer, profiler, dispatch mode or transformation. A `TorchFunctionMode` is
    not asked for: a default device is one.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or _len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def _plain_tensors(args: Sequence[Any]) -> list[Tensor] | None:
    """The tensors among arguments and in their lists; None if an argument is not of eager code."""
    tensors: list[Tensor] = []
    for arg in args:
        kind = type(arg)
        if kind in TENSOR_TYPES:
            if arg.is_meta:
                return None
            tensors.append(arg)
        elif kind in LIST_TYPES:
            elements = _plain_tensors(arg)
            if elements is None:
                return None
            tensors += elements
        elif kind not in OTHER_TYPES:
            return None
    return tensors


class Operator:
    """An operator `linvis::name`, and a short way to call it.

    PyTorch's dispatcher serves compilers, exports, modes and transformations. On one CPU core it
    takes about 9 microseconds a call, 24 where a gradient will be wanted, 50 with a list of tensors
    too. Eager code has none of these, and calls the function itself, behind an `autograd.Function`
    where a gradient is wanted: 2, 7 and 9 microseconds.

    The function gives one tensor, or a list of them if it is differentiable; arguments come by
    position, and eager code does not check their types.

    Attributes:
        definition: The operator as PyTorch has it.
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.definition = torch.library.custom_op(f'{NAMESPACE}::{name}', function, mutates_args=())
        self._name = f'{NAMESPACE}_{name}'
        self._function = function
        self._differentiable: type[torch.autograd.Function] | None = None

        def refuse(*_args: Any) -> NoReturn:
            raise self._no_derivative('of a derivative (create_graph=True and backward again)')

        # until it is given one: what runs in a backward pass is an operator too
        self.definition.register_autograd(refuse, setup_context=_save_nothing)

    def __call__(self, *args: Any) -> Any:
        if not torch.compiler.is_compiling():
            if forward_ad._current_level >= 0:
                self._refuse_tangents(args)
            if torch._C._functorch.peek_interpreter_stack() is not None:
                self._refuse_functional_gradients(args)
        tensors = None if _is_watched() else _plain_tensors(args)
        if tensors is None:
            return self.definition(*args)
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return self._function(*args)
        if self._differentiable is None:
            return self.definition(*args)
        flat, lengths = _flatten(args)
        outputs = self._differentiable.apply(lengths, *flat)
        return list(outputs) if isinstance(outputs, tuple) else outputs

    def _refuse_tangents(self, args: Sequence[Any]) -> None:
        """Raise if an argument carries a tangent, which PyTorch would drop without a word."""
        flat, _ = _flatten(args)
        tensors = (arg for arg in flat if isinstance(arg, Tensor))
        if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise self._no_derivative('in forward mode (jvp, jacfwd, make_dual)')

    def _refuse_functional_gradients(self, args: Sequence[Any]) -> None:
        """Raise if torch.func wants a gradient by an argument.

        PyTorch refuses too, in words that name neither operator nor remedy.
        """
        levels = torch._C._functorch.get_interpreter_stack() or ()
        asked = torch._C._functorch.TransformType.Grad in (level.key() for level in levels)
        if not (asked and torch.is_grad_enabled()):
            return
        flat, _ = _flatten(args)
        if any(isinstance(arg, Tensor) and _is_tracked(arg) for arg in flat):
            raise self._no_derivative('by torch.func (grad, vjp, jacrev, hessian)')

    def _no_derivative(self, which: str) -> NotImplementedError:
        name = self._name.removeprefix(f'{NAMESPACE}_').removesuffix('_fwd').removesuffix('_bwd')
        return NotImplementedError(
            f"{name} has no derivative {which} but with backend='reference', which has those of "
            f'any order.'
        )

    def register_fake(self, function: Function) -> Function:
        """Say which outputs there are without computing them: a decorator."""
        self.definition.register_fake(function)
        return function

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]
    ) -> None:
        """Give the operator a derivative, as `torch.library.register_autograd` does.

        Args:
            backward: Takes the context and the gradient by the output, a list if that is one;
                returns one gradient for each argument, a list for a list.
            setup_context: Takes the context, the arguments and the output.
        """
        self.definition.register_autograd(backward, setup_context=setup_context)
        function = self._function

        def run_forward(ctx: Any, lengths: tuple[int | None, ...], *flat: Any) -> Any:
            args = _unflatten(flat, lengths)
            output = function(*args)
            setup_context(ctx, args, output)
            ctx.gives_list = isinstance(output, list)
            return tuple(output) if ctx.gives_list else output

        def run_backward(ctx: Any, *grads: Tensor | None) -> Any:
            by_args = backward(ctx, list(grads)) if ctx.gives_list else backward(ctx, *grads)
            return None, *_flatten(by_args)[0]

        # under the operator's name, which anomaly detection and `grad_fn` tell
        self._differentiable = type(
            self._name,
            (torch.autograd.Function,),
            {'forward': staticmethod(run_forward), 'backward': staticmethod(run_backward)},
        )


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _is_tracked(tensor: Tensor) -> bool:
    """Whether a level of torch.func.grad follows a tensor, also inside a vmap."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad:
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def _flatten(args: Sequence[Any]) -> tuple[list[Any], tuple[int | None, ...]]:
    """Arguments with the elements of lists in their place, and the length of each list or None.

    There are no lengths where there are no lists.
    """
    if LIST_TYPES.isdisjoint(map(type, args)):
        return list(args), ()
    flat: list[Any] = []
    lengths: list[int | None] = []
    for arg in args:
        if type(arg) in LIST_TYPES:
            flat.extend(arg)
            lengths.append(len(arg))
        else:
            flat.append(arg)
            lengths.append(None)
    return flat, tuple(lengths)


def _unflatten(flat: Sequence[Any], lengths: Sequence[int | None]) -> tuple[Any, ...]:
    if not lengths:
        return tuple(flat)
    args: list[Any] = []
    start = 0
    for length in lengths:
        args.append(flat[start] if length is None else list(flat[start : start + length]))
        start += 1 if length is None else length
    return tuple(args)


def custom_op(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Register a function as operator `linvis::name` without side effects on its arguments.

    PyTorch accepts a second definition of a name silently and mixes the two; this raises instead.

    Args:
        name: Name of the operator inside the namespace.

    Returns:
        A decorator that turns the function into an `Operator`.

    Raises:
        RuntimeError: If the name is defined already, which means that linvis_ops was imported
            twice.
    """

    def register(function: Callable[..., Any]) -> Operator:
        if hasattr(getattr(torch.ops, NAMESPACE), name):
            raise RuntimeError(
                f'operator {NAMESPACE}::{name} is defined already: linvis_ops was imported under '
                f'two names or from two folders; keep one.'
            )
        return Operator(name, function)

    return register


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which an operator's own arithmetic keeps its dtypes, which the inputs' set."""
    # the meta device cannot be asked
    if tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)

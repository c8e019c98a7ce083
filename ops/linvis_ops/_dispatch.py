"""Choice of a backend: a priority list whose predicates say why one cannot run."""

import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = 'LINVIS_OPS_BACKEND'


class BackendUnavailableError(RuntimeError):
    """A backend was named that does not exist or cannot run these inputs."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Attributes:
        name: What users write as `backend=`.
        unavailable: Takes the operator's input tensors (none: asks about the machine alone);
            returns None if the backend can run them, else a clause that says why not.
        forward: Implementation of the forward operator.
        backward: Implementation of the backward operator.
        leads: Takes the input tensors of a pass, those of the backward pass with the gradients
            behind them; whether 'auto' then takes this backend, if it can run, before those that
            are preferred to it. None: never.
    """

    name: str
    unavailable: Callable[..., str | None]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    leads: Callable[..., bool] | None = None


_BACKENDS: dict[str, tuple[Backend, ...]] = {}

# The definition in plain differentiable PyTorch: always there, never registered as an operator.
REFERENCE = 'reference'


def register_backends(op: str, backends: Sequence[Backend]) -> None:
    """Record the backends of an operator, the preferred one first."""
    _BACKENDS[op] = tuple(backends)


def available_backends(op: str, *tensors: Tensor) -> dict[str, str | None]:
    """Backends of an operator and why they cannot run.

    Args:
        op: Name of the operator, e.g. 'bi_wkv'.
        tensors: Its input tensors; none to ask about the machine alone.

    Returns:
        Name to None (can run) or a clause that says why not, the preferred backend first.

    Raises:
        ValueError: If there is no such operator.
    """
    if op not in _BACKENDS:
        raise ValueError(f'there is no operator {op!r}; there are {", ".join(sorted(_BACKENDS))}.')
    reasons = {backend.name: backend.unavailable(*tensors) for backend in _BACKENDS[op]}
    return {**reasons, REFERENCE: None}


def operators() -> tuple[str, ...]:
    """Names of all operators that have a choice of backends."""
    return tuple(sorted(_BACKENDS))


def check_backend_name(op: str, name: str) -> None:
    """Raise BackendUnavailableError unless `name` is 'auto' or a backend of the operator."""
    names = ['auto', *(backend.name for backend in _BACKENDS[op]), REFERENCE]
    if name not in names:
        raise BackendUnavailableError(
            f'{op}: there is no backend {name!r}; choose one of {", ".join(names)}.'
        )


def requested_backend(op: str, name: str) -> str:
    """The backend that is asked for: the argument, or LINVIS_OPS_BACKEND where it is 'auto'.

    The variable is for all operators: one that has no backend of that name chooses as without it.
    """
    if name != 'auto':
        check_backend_name(op, name)
        return name
    override = os.environ.get(ENVIRONMENT_VARIABLE) or 'auto'
    if override == 'auto':
        return override
    names = [backend.name for backends in _BACKENDS.values() for backend in backends]
    if override in names and override not in [backend.name for backend in _BACKENDS[op]]:
        return 'auto'
    try:
        check_backend_name(op, override)
    except BackendUnavailableError as error:
        raise BackendUnavailableError(f'{ENVIRONMENT_VARIABLE}={override}: {error}') from None
    return override


def default_backend(op: str) -> str:
    """The backend that 'auto' stands for on this machine, whatever the tensors.

    For some of them another backend may lead.

    Raises:
        BackendUnavailableError: If LINVIS_OPS_BACKEND names one that no operator has, or that
            this operator has and that cannot run here.
    """
    reasons = available_backends(op)
    name = requested_backend(op, 'auto')
    if name == 'auto':
        return next(backend for backend, reason in reasons.items() if reason is None)
    if reasons[name] is not None:
        raise _cannot_run(op, name, f'{name} cannot run, since {reasons[name]}')
    return name


def _cannot_run(op: str, name: str, reason: str) -> BackendUnavailableError:
    """The error for a backend that is asked for and cannot run.

    The variable is named where it asks for that backend: the caller may have given no argument.
    """
    asked = (
        f'{ENVIRONMENT_VARIABLE}={name}: ' if os.environ.get(ENVIRONMENT_VARIABLE) == name else ''
    )
    return BackendUnavailableError(f'{asked}{op}: {reason}.')


@functools.cache
def _say_once(level: int, message: str) -> None:
    logger.log(level, message)


def select(op: str, name: str, *tensors: Tensor) -> Backend:
    """Choose the backend that runs these tensors.

    Args:
        op: Name of the operator.
        name: 'auto' for the first of the list that can run, unless another one leads, or a
            backend's name.
        tensors: Input tensors of the operator.

    Returns:
        The backend. A skipped backend is logged once: as a warning for tensors on a GPU, else at
        debug level.

    Raises:
        BackendUnavailableError: If the named backend cannot run these tensors; the message says
            why.
    """
    if name == 'auto':
        for backend in _BACKENDS[op]:
            leads = backend.leads
            if leads and backend.unavailable(*tensors) is None and leads(*tensors):
                return backend
    skipped: list[str] = []
    for backend in _BACKENDS[op]:
        if name not in ('auto', backend.name):
            continue
        reason = backend.unavailable(*tensors)
        if reason is None:
            if skipped:
                level = logging.WARNING if tensors[0].device.type == 'cuda' else logging.DEBUG
                _say_once(
                    level, f'{op} runs on backend {backend.name}: ' + '; '.join(skipped) + '.'
                )
            return backend
        skipped.append(f'{backend.name} cannot run, since {reason}')
    raise _cannot_run(op, name, '; '.join(skipped))

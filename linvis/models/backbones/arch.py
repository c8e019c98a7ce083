"""What constructors of backbones have in common: settings of an arch, checks of arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

from linvis_ops import available_backends


def settings_of(
    arch: str | Mapping[str, Any],
    archs: Mapping[str, Mapping[str, Any]],
    required: Sequence[str],
    optional: Mapping[str, Any],
) -> dict[str, Any]:
    """Settings of an arch given by name or as a dict.

    Args:
        arch: Name or settings.
        archs: Settings by name.
        required: Settings that an arch must have.
        optional: Settings that it may have, with their values where it does not.

    Raises:
        ValueError: If the name is unknown, a setting is missing, there is no such setting, or a
            required one is not made of whole numbers from 1 on.
    """
    if isinstance(arch, str):
        arch = archs.get(arch, arch)
    if not isinstance(arch, Mapping):
        raise ValueError(f'arch must be one of {", ".join(archs)} or a dict, got {arch!r}.')
    missing = [key for key in required if key not in arch]
    unknown = [key for key in arch if key not in required and key not in optional]
    if missing or unknown:
        raise ValueError(
            f'An arch given as a dict needs {", ".join(required)} and may have '
            f'{", ".join(optional) or "nothing else"}; missing: {missing}, unknown: {unknown}.'
        )
    for name in required:
        several = isinstance(next(iter(archs.values()))[name], Sequence)
        value = arch[name]
        numbers = value if several and isinstance(value, Sequence) else (value,)
        if several != isinstance(value, Sequence) or not all(
            isinstance(number, int) and number > 0 for number in numbers
        ):
            kind = 'whole numbers from 1 on, one a stage' if several else 'a whole number from 1 on'
            raise ValueError(f'{name} of an arch must be {kind}, got {value!r}.')
    return {**optional, **arch}


def check_backend(backend: str, operators: Sequence[str]) -> None:
    """Tell an unknown backend when the model is built, not in the first iteration.

    Whether a known one can run is told by the operators, as it depends on the tensors.

    Args:
        backend: Name to be checked.
        operators: Operators of the model; all of them must have the backend.

    Raises:
        ValueError: If one of them has no backend of this name.
    """
    if backend == 'auto':
        return
    first, *others = (available_backends(operator) for operator in operators)
    names = ['auto', *(name for name in first if all(name in other for other in others))]
    if backend not in names:
        raise ValueError(f'backend must be one of {", ".join(names)}, got {backend!r}.')


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Drop path of each of so many layers, which grows linearly from 0 to the rate.

    Raises:
        ValueError: If the rate is not from 0 to below 1.
    """
    if not 0 <= rate < 1:
        raise ValueError(f'drop_path_rate must be from 0 to below 1, got {rate}.')
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def height_and_width(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width in pixels, of both or of one number for both.

    Raises:
        ValueError: If these are not one or two whole numbers from 1 on.
    """
    sizes = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(
            'img_size must be one whole number from 1 on, or two of them as (height, width), got '
            f'{img_size!r}.'
        )
    return sizes

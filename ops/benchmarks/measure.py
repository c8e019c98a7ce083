"""From the registry to rows: every implementation of an operator, shape by shape."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.passes import PASSES, Runnable, Shape, tokens
from benchmarks.registry import OPERATORS, Operator, elements
from benchmarks.results import Row, shape_text
from benchmarks.rivals import Rival, UnavailableError
from benchmarks.timing import MIB, Timer, Timing
from linvis_ops import BackendUnavailableError

GROUPS = ('ours', 'rivals')
# The definition is slow on purpose: it counts among the rivals.
DEFINITION = 'reference'


@dataclass(frozen=True)
class Implementation:
    """One implementation of an operator: a backend of ours or a rival."""

    name: str
    ours: bool
    prepare: Callable[[Shape, torch.dtype, str], Runnable]


def implementations(operator: Operator) -> list[Implementation]:
    """All implementations of an operator, ours first."""

    def backend(name: str) -> Implementation:
        return Implementation(
            name,
            name != DEFINITION,
            lambda shape, dtype, device: operator.prepare(shape, dtype, device, name),
        )

    def rival(one: Rival) -> Implementation:
        return Implementation(
            one.name,
            False,
            lambda shape, dtype, device: one.prepare(
                shape, dtype, device, operator.bytes_by_pass(shape, dtype)
            ),
        )

    return [*map(backend, operator.backends()), *map(rival, operator.rivals)]


def _names(operators: Sequence[Operator]) -> list[str]:
    """Names of the implementations of operators."""
    return sorted({one.name for operator in operators for one in implementations(operator)})


@dataclass(frozen=True)
class Selection:
    """What to measure.

    Attributes:
        operators: The operators.
        shapes: Sizes to measure instead of the registry's, at those operators that have as many
            axes; none: the shapes of the registry.
        dtypes: Names; none: those of the registry.
        passes: Some of PASSES.
        impls: Names of backends and rivals, 'ours', 'rivals'; none: all.
        repeats: Most repetitions of a call.
        quick: Of the registry's shapes and dtypes take the first alone.
    """

    operators: Sequence[Operator]
    shapes: Sequence[tuple[int, ...]] = ()
    dtypes: Sequence[str] = ()
    passes: Sequence[str] = PASSES
    impls: Sequence[str] = ()
    repeats: int = 200
    quick: bool = False

    def cases(self, operator: Operator) -> Iterator[tuple[Shape, str]]:
        """Shapes and dtypes of an operator."""
        first = slice(1 if self.quick else None)
        fitting = [sizes for sizes in self.shapes if len(sizes) == len(operator.axes)]
        for sizes in fitting if self.shapes else operator.shapes[first]:
            for dtype in self.dtypes or operator.dtypes[first]:
                yield operator.shape(sizes), dtype

    def chosen(self, operator: Operator) -> list[Implementation]:
        """Implementations of an operator that are to be measured, ours first."""
        return [
            one
            for one in implementations(operator)
            if not self.impls
            or one.name in self.impls
            or ('ours' if one.ours else 'rivals') in self.impls
        ]

    def unfitting(self, operator: Operator) -> str | None:
        """Why nothing of an operator is selected, though something of others is, or None."""
        if not list(self.cases(operator)):
            shapes = ', '.join('x'.join(map(str, sizes)) for sizes in self.shapes)
            return f'its axes are {"x".join(operator.axes)}, and the shapes are {shapes}'
        if not self.chosen(operator):
            return f'it has no implementation {" or ".join(self.impls)}'
        return None

    def check(self) -> None:
        """Raise ValueError if a shape or an implementation fits no operator, or nothing is left."""
        present = [operator for operator in self.operators if not operator.missing()]
        if not present:
            raise ValueError(f'{self.operators[0].missing()}.')
        names = _names(present)
        for name in self.impls:
            if name in (*GROUPS, *names):
                continue
            having = [o.name for o in OPERATORS if not o.missing() and name in _names([o])]
            only = f' of {", ".join(o.name for o in present)}, only of {", ".join(having)}'
            raise ValueError(
                f'there is no implementation {name!r}{only if having else ""}; '
                f'there are {", ".join((*GROUPS, *names))}.'
            )
        for sizes in self.shapes:
            if all(len(sizes) != len(operator.axes) for operator in self.operators):
                axes = ', '.join(f'{o.name} {"x".join(o.axes)}' for o in self.operators)
                raise ValueError(f'the shape {"x".join(map(str, sizes))} fits no operator: {axes}.')
        reasons = {operator.name: self.unfitting(operator) for operator in present}
        if all(reasons.values()):
            told = '; '.join(f'{name}: {reason}' for name, reason in reasons.items())
            raise ValueError(f'nothing is left to measure: {told}.')


@dataclass
class Measurement:
    """Measures a selection.

    Attributes:
        selection: What to measure.
        timer: Measures a call.
        copy_gb_s: Speed of a big copy in this run.
        say: Gets a line of text for each implementation that is left out, and each reason.
        rows: What was measured so far.
        left_out: What was not measured, with the reason.
    """

    selection: Selection
    timer: Timer
    copy_gb_s: float
    say: Callable[[str], object] = print
    rows: list[Row] = field(default_factory=list)
    left_out: list[Row] = field(default_factory=list)

    def run(self) -> Iterator[Row]:
        """Measure, and yield each row once it is measured."""
        for operator in self.selection.operators:
            reason = operator.missing() or self.selection.unfitting(operator)
            if reason:
                self.say(f'{operator.name} is left out: {reason}.')
                continue
            for shape, dtype in self.selection.cases(operator):
                for one in self.selection.chosen(operator):
                    yield from self._implementation(operator, one, shape, dtype)

    def _implementation(
        self, operator: Operator, one: Implementation, shape: Shape, dtype_name: str
    ) -> Iterator[Row]:
        """Rows of all passes of one implementation at one shape and dtype."""
        dtype = getattr(torch, dtype_name)
        least_bytes = operator.bytes_by_pass(shape, dtype)
        self.timer.release()
        before = self.timer.allocated()
        runnable: Runnable | None = None
        for pass_name in self.selection.passes:
            row: Row = {
                'op': operator.name,
                'impl': one.name,
                'pass': pass_name,
                'dtype': dtype_name,
                'shape': shape,
            }
            try:
                runnable = runnable or one.prepare(shape, dtype, self.timer.device)
                what, peak, timing = self._time(runnable, pass_name)
            # a kernel that does not compile or run may raise anything; the rest is still measured,
            # and the run ends with an error if the kernel is ours
            except Exception as error:
                self._leave_out(row, error, one.ours)
                continue
            finally:
                self.timer.release()
            gb_s = least_bytes[pass_name] / timing.quantile(0.5) / 1e6
            row |= {
                'ours': one.ours,
                'tokens': tokens(shape),
                'elements': elements(shape),
                'least_bytes': least_bytes[pass_name],
                'ms': round(timing.quantile(0.5), 5),
                'ms_10': round(timing.quantile(0.1), 5),
                'ms_90': round(timing.quantile(0.9), 5),
                'repeats': len(timing.samples),
                'gb_s': round(gb_s, 2),
                'copy_share': round(gb_s / self.copy_gb_s, 4),
                'peak_mib': round((peak - before) / MIB, 2),
                'graph': timing.graph,
                'call': what,
                'note': timing.note,
            }
            self.rows.append(row)
            yield row

    def _time(self, runnable: Runnable, pass_name: str) -> tuple[str, int, Timing]:
        """What ran, most bytes in use meanwhile, times; what the pass has saved is freed after."""
        call = runnable.call(pass_name)
        peak = self.timer.peak(call.run)
        return call.what, peak, self.timer.times(call.run, self.selection.repeats)

    def _leave_out(self, row: Row, error: Exception, ours: bool) -> None:
        expected = isinstance(error, (BackendUnavailableError, UnavailableError))
        no_memory = isinstance(error, torch.OutOfMemoryError)
        if no_memory:
            reason = 'out of memory'
        else:
            text = (str(error).strip() or repr(error)).splitlines()[0]
            reason = text if expected else f'{type(error).__name__}: {text}'
        self.left_out.append(
            {**row, 'reason': reason, 'failed': ours and not expected and not no_memory}
        )
        same = [(one['op'], one['impl'], one['reason']) for one in self.left_out]
        if same.count((row['op'], row['impl'], reason)) == 1:
            where = f'{row["pass"]} {row["dtype"]} {shape_text(row["shape"])}'
            self.say(f'{row["op"]} {row["impl"]} is left out, first at {where}: {reason}')

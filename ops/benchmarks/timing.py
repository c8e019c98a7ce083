"""Timing of GPU work: cold cache, CUDA events, host time taken out by CUDA graphs."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

MIB = 2**20
# Calls before anything is timed: kernels are compiled and tuned, handles made.
WARM_UP = 3
# A row stops after this many milliseconds of measured work, but not before LEAST_SAMPLES.
MOST_MS = 2000.0
LEAST_SAMPLES = 10
ESTIMATE = 3  # samples that tell how many fit into MOST_MS; not counted

Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Times of one call.

    Attributes:
        samples: Milliseconds of each repetition.
        graph: Whether a CUDA graph of the call was replayed, so that no time of the host counts.
        note: Why not, if it was not.
    """

    samples: Sequence[float]
    graph: bool
    note: str | None = None

    def quantile(self, share: float) -> float:
        """Milliseconds that a share of the repetitions stays below, between samples linearly."""
        ordered = sorted(self.samples)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])


class Timer(Protocol):
    """What measures calls on a device."""

    device: str

    def times(self, run: Run, repeats: int) -> Timing:
        """Time a call at most so many times."""
        ...

    def allocated(self) -> int:
        """Bytes in use on the device."""
        ...

    def peak(self, run: Run) -> int:
        """Most bytes in use on the device while a call runs."""
        ...

    def release(self) -> None:
        """Give memory back that nothing uses any more."""
        ...


class CudaTimer:
    """Measures on the current CUDA device, on a stream of its own, as graphs must be captured.

    Inputs, calls and flushes all have to run inside the context `with CudaTimer() as timer`.
    """

    device = 'cuda'

    def __init__(self) -> None:
        self.flush_bytes = max(
            256 * MIB, 4 * torch.cuda.get_device_properties('cuda').L2_cache_size
        )
        self._stream = torch.cuda.Stream()
        self._context = torch.cuda.stream(self._stream)

    def __enter__(self) -> 'CudaTimer':
        self._context.__enter__()
        self._scratch = torch.empty(self.flush_bytes // 4, dtype=torch.float32, device='cuda')
        self._sum = torch.empty((), dtype=torch.float32, device='cuda')
        return self

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(*error)

    def times(self, run: Run, repeats: int) -> Timing:
        """Time a call, at most `repeats` times; see docs/measuring.md for the method."""
        for _ in range(WARM_UP):
            run()
        torch.cuda.synchronize()
        graph, note = self._capture(run)
        timed = run if graph is None else graph.replay
        first = Timing(self._samples(timed, ESTIMATE), graph is not None).quantile(0.5)
        count = min(max(int(MOST_MS / max(first, 1e-3)), LEAST_SAMPLES), repeats)
        return Timing(self._samples(timed, count), graph is not None, note)

    def allocated(self) -> int:
        """Bytes of tensors."""
        return torch.cuda.memory_allocated()

    def peak(self, run: Run) -> int:
        """Most bytes of tensors while a call runs, once it is compiled and tuned."""
        run()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()

    def release(self) -> None:
        """Free what no tensor uses, graphs of failed calls included."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def _capture(self, run: Run) -> tuple[torch.cuda.CUDAGraph | None, str | None]:
        """Graph of a call, or None and why there is none."""
        # a failed capture leaves the allocator in doubt, so what would break one is found before
        torch.cuda.set_sync_debug_mode('error')
        try:
            run()
        except RuntimeError as error:
            if 'synchronizing' not in str(error):
                raise
            return None, 'it synchronises host and device'
        finally:
            torch.cuda.set_sync_debug_mode('default')
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return None, f'its capture failed: {str(error).splitlines()[0]}'
        return graph, None

    def _samples(self, run: Run, count: int) -> list[float]:
        """Milliseconds of each of `count` calls, each with nothing of its inputs in the cache."""
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(count)
        ]
        for start, stop in events:
            self._flush()
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in events]

    def _flush(self) -> None:
        """Fill the L2 cache with lines that nobody needs and that need not be written back."""
        self._scratch.zero_()
        torch.sum(self._scratch, 0, out=self._sum)

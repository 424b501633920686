"""Where and how `bench.gpu` times: the device, device events and graphs, the rates that limits are made of. One place, so that every part
also runs on a CPU under Triton's interpreter, tiny and with a plain timer (`--device cpu --tiny`), and cannot be broken unseen.

No kernel and no workload here. Called by every part.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class NotBuiltError(Exception):
    """Braid has no such kernel yet; the message says which. Such a row has `not_built`."""


class NeedsDeviceError(Exception):
    """By its nature this cannot be asked of a CPU; the message says why. Such a row has `needs_device`."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What the device reached in this run. read: bytes/s. bf16, fp8: operations/s, 0 where there is no such product. kernel_s: of an empty
    kernel inside a graph."""

    read: float
    bf16: float
    fp8: float
    kernel_s: float

    def seconds(self, *, num_bytes: float = 0.0, flops: float = 0.0, kernels: float = 0.0) -> float:
        """The larger of moving and multiplying, and the launches that can't be avoided."""
        return max(num_bytes / self.read, flops / self.bf16) + kernels * self.kernel_s


@dataclass(frozen=True, slots=True)
class Clock:
    """device: "cuda" or "cpu". rates: what limits are made of; ones where nobody has probed yet."""

    device: torch.device
    is_tiny: bool = False
    rates: Rates = Rates(1.0, 1.0, 1.0, 0.0)

    def sized(self, full: T, tiny: T) -> T:
        return tiny if self.is_tiny else full

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, in a tiny run too: some kernels are for this one alone."""
        return torch.bfloat16

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Gives back what no tensor holds any more."""
        if self.is_gpu:
            torch.cuda.empty_cache()

    def seconds(self, work: Callable[[], Any], rep_ms: float = 80) -> float:
        """Median seconds of one call after a warm-up, by device events and with a cold L2 cache."""
        if self.is_gpu:
            from triton.testing import do_bench

            return float(do_bench(work, warmup=20, rep=rep_ms, return_mode="median")) / 1e3
        times = []
        for _ in range(2):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def wall_s(self, work: Callable[[], Any], times: int = 1) -> float:
        """Seconds of a call as the host sees them, of so many calls in a row."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            work()
        self.synchronize()
        return (time.perf_counter() - start) / times

    def graph_of(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """The work as one CUDA graph, so that launches cost what they cost in serving; on a CPU the work itself."""
        work()
        if not self.is_gpu:
            return work
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def in_graph_s(self, work: Callable[[], Any], rep_ms: float = 80) -> float:
        return self.seconds(self.graph_of(work), rep_ms)

    def busy_s(self, work: Callable[[], Any], times: int) -> float:
        """Seconds that the device computed during one call, by the profiler: the union of all kernels' spans."""
        if not self.is_gpu:
            raise NeedsDeviceError("a CPU is its own host: nothing runs outside it")
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(times):
                work()
            torch.cuda.synchronize()
        spans = sorted((event.time_range.start, event.time_range.end) for event in profiler.events() if event.device_type.name == "CUDA")
        if not spans:
            raise RuntimeError("the profiler saw no kernel")
        busy, reached = 0.0, 0.0
        for start, end in spans:
            busy += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return busy / 1e6 / times


def clock_of(device: str, is_tiny: bool, rates: Rates | None = None) -> Clock:
    """Sets up what a tiny run on a CPU needs. Its process must have been started with TRITON_INTERPRET=1."""
    if device == "cpu":
        import tests.kernels.interpreter.conftest  # noqa: F401  # mends the interpreter
        from service.runner import kv_cache

        assert callable(kv_cache.as_kept)
        kv_cache.as_kept = lambda keys: keys  # as on a GPU, because the kernels are a GPU's
    return Clock(torch.device(device), is_tiny, rates or Rates(1.0, 1.0, 1.0, 0.0))

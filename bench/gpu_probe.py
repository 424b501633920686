"""Part of `bench.gpu`, run first and last: what the device can do at best. Two readings that differ by more than 5 % make the run void.

Bandwidth (copied and read), matrix rates (bf16, fp8), and what a launch costs: alone, inside a graph, and inside a graph where a kernel may
begin before the one in front of it has ended (programmatic dependent launch).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from bench.gpu_clock import Clock, NeedsDeviceError
from bench.gpu_score import Step
from bench.probe import describe_machine

CHAIN = 200


def steps(clock: Clock) -> list[Step]:
    parts = {
        "machine": machine,
        "bandwidth": bandwidth,
        "bf16 product": bf16,
        "launch": launch,
        "fp8 product": fp8,
        "dependent launch": pdl,
    }
    return [({"case": name}, partial(work, clock)) for name, work in parts.items()]


def machine(clock: Clock) -> dict[str, Any]:
    about = describe_machine() | {"triton": triton.__version__, "gpu": "none"}
    if clock.is_gpu:
        device = torch.cuda.get_device_properties(0)
        about |= {"gpu": device.name, "memory_bytes": device.total_memory, "multiprocessors": device.multi_processor_count}
    return about


def bandwidth(clock: Clock) -> dict[str, Any]:
    source = torch.randn(clock.sized(2**29, 2**18), device=clock.device)
    target = torch.empty_like(source)
    copy_s, read_s = clock.seconds(lambda: target.copy_(source)), clock.seconds(lambda: source.sum())
    return {"copy_bytes_per_s": 2 * source.nbytes / copy_s, "read_bytes_per_s": source.nbytes / read_s}


def bf16(clock: Clock) -> dict[str, Any]:
    size = clock.sized(8192, 128)
    a, b = (torch.randn(size, size, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    return {"bf16_flops_per_s": 2 * size**3 / clock.seconds(lambda: a @ b, 200)}


def fp8(clock: Clock) -> dict[str, Any]:
    size = clock.sized(8192, 128)
    a, b = (torch.randn(size, size, device=clock.device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=clock.device)
    taken_s = clock.seconds(lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16), 200)
    return {"fp8_flops_per_s": 2 * size**3 / taken_s}


@triton.jit
def add_kernel(x_ptr):  # type: ignore[no-untyped-def]
    tl.store(x_ptr, tl.load(x_ptr) + 1)


@triton.jit
def add_dependent_kernel(x_ptr):  # type: ignore[no-untyped-def]
    gdc_wait()
    gdc_launch_dependents()
    tl.store(x_ptr, tl.load(x_ptr) + 1)


def launch(clock: Clock) -> dict[str, Any]:
    """Of the smallest kernel that does anything: by the host, and as one of a chain inside a graph."""
    row = torch.zeros(1, device=clock.device)
    count = clock.sized(CHAIN, 2)

    def chain() -> None:
        for _ in range(count):
            add_kernel[(1,)](row)

    chain()
    return {"kernel_in_graph_s": clock.in_graph_s(chain) / count, "kernel_by_host_s": clock.wall_s(chain, 3) / count}


def pdl(clock: Clock) -> dict[str, Any]:
    if not clock.is_gpu:
        raise NeedsDeviceError("the interpreter has no launches that depend on one another")
    if torch.cuda.get_device_capability()[0] < 9:
        raise NeedsDeviceError("dependent launch begins with sm_90")
    row = torch.zeros(1, device=clock.device)

    def chain() -> None:
        for _ in range(CHAIN):
            add_dependent_kernel[(1,)](row, launch_pdl=True)

    chain()
    row.zero_()
    chain()
    torch.cuda.synchronize()
    return {"passes": float(row) == CHAIN, "dependent_kernel_in_graph_s": clock.in_graph_s(chain) / CHAIN}

"""Runs a warp-specialised Gluon kernel on a CPU: its functions as they stand, over stand-ins for the language, a thread a partition.

Triton's interpreter knows no Gluon. What can be wrong in such a kernel without a GPU's fault is bounds, masks, turns of rings and phases
of barriers; these run here. Products under way are computed when they are waited for, so a tile that was given back too early shows.
Layouts mean nothing here, save that a tile of rows of 128 bytes lies in memory chunk by chunk, as the copy engine writes it. Knows the
part of the language that `kernels/attention/prefill_hopper.py` uses. Called by `test_hopper_on_cpu`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch

from tests.kernels.launches import Launch

PATIENCE_S = 20.0
CHUNK = 64


class Numbers(torch.Tensor):
    """A tensor that can be asked for its type's layout."""

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=None)


def numbers(value: Any) -> Any:
    return torch.as_tensor(value).as_subclass(Numbers)


class Pointer:
    def __init__(self, memory: torch.Tensor, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


class Shared:
    """Shared memory: a view of it, whose last two dimensions are [rows, chunks, CHUNK] for a tile."""

    def __init__(self, view: torch.Tensor, shape: Sequence[int], is_transposed: bool = False) -> None:
        self.view, self.shape, self.is_transposed, self.dtype = view, tuple(shape), is_transposed, view.dtype

    def index(self, at: Any) -> Shared:
        return Shared(self.view[int(at)], self.shape[1:])

    def permute(self, order: tuple[int, int]) -> Shared:
        assert order == (1, 0)
        return Shared(self.view, self.shape[::-1], not self.is_transposed)

    def read(self) -> torch.Tensor:
        rows = self.shape[::-1] if self.is_transposed else self.shape
        found = self.view.reshape(rows)
        return found.T if self.is_transposed else found

    def load(self, layout: Any) -> Any:
        return numbers(self.read().clone())

    def store(self, value: torch.Tensor) -> None:
        self.view.copy_(value.reshape(self.view.shape))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        stages, rows, width = shape
        return Shared(self.view.view(stages, width // CHUNK, rows, CHUNK).transpose(1, 2), shape)


class Barrier:
    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.count = self.arrived = self.missing = self.phase = 0

    def change(self, arrived: int, num_bytes: int) -> None:
        with self.condition:
            self.arrived += arrived
            self.missing += num_bytes
            assert self.arrived <= self.count, "more arrivals than the barrier counts"
            if self.arrived == self.count and self.missing == 0:
                self.arrived, self.phase = 0, self.phase + 1
                self.condition.notify_all()

    def wait(self, parity: Any) -> None:
        with self.condition:
            is_done = self.condition.wait_for(lambda: (self.phase & 1) != int(parity), PATIENCE_S)
        assert is_done, "a barrier that nobody completes"


class Barriers(list[Barrier]):
    def index(self, at: Any) -> Barrier:  # type: ignore[override]
        return self[int(at)]


class Pending:
    """A product under way."""

    def __init__(self, a: Any, b: Shared, acc: Any) -> None:
        self.a, self.b, self.acc = a, b, acc
        self.type = SimpleNamespace(layout=None)

    def compute(self) -> Any:
        a = self.a.read() if isinstance(self.a, Shared) else self.a
        product = numbers(a.float() @ self.b.read().float())
        return product if self.acc is None else self.acc + product


class Warps(threading.local):
    """The products that this thread's warps have under way, oldest first."""

    def __init__(self) -> None:
        self.pending: list[Pending] = []


class Machine:
    """One program of a grid."""

    def __init__(self, program: tuple[int, int], grid: tuple[int, int], functions: dict[str, Any]) -> None:
        self.warps = Warps()
        self.functions = functions
        self.language = SimpleNamespace(
            **{name: getattr(torch, name) for name in ("int64", "float32", "exp2", "zeros_like")},
            program_id=lambda axis: numbers(program[axis]),
            num_programs=lambda axis: numbers(grid[axis]),
            constexpr=lambda value: value,
            static_range=range,
            arange=lambda start, end, layout: numbers(torch.arange(start, end)),
            full=lambda shape, value, dtype, layout: numbers(torch.full(shape, value, dtype=dtype)),
            zeros=lambda shape, dtype, layout: numbers(torch.zeros(shape, dtype=dtype)),
            where=lambda condition, a, b: torch.where(numbers(condition), numbers(a), numbers(b)),
            minimum=lambda a, b: torch.minimum(numbers(a), numbers(b)),
            maximum=lambda a, b: torch.maximum(numbers(a), numbers(b)),
            cdiv=lambda a, b: -(-a // b),
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis),
            convert_layout=lambda x, layout: x,
            inline_asm_elementwise=lambda asm, constraints, args, **rest: args[0],
            thread_barrier=lambda: None,
            load=load,
            store=store,
            allocate_shared_memory=allocate,
            warp_specialize=self.specialize,
            **dict.fromkeys(("BlockedLayout", "SliceLayout", "NVMMADistributedLayout", "DotOperandLayout"), lambda *rest: None),
        )

    def multiply(self, a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
        product = Pending(a, b, acc if use_acc else None)
        if not is_async:
            return product.compute()
        self.warps.pending.append(product)
        return product

    def wait_for_products(self, num_left: int, deps: Sequence[Any]) -> Any:
        pending = self.warps.pending
        done = {id(product): product.compute() for product in pending[: len(pending) - num_left]}
        del pending[: len(pending) - num_left]
        found = [done[id(dep)] if isinstance(dep, Pending) else dep for dep in deps]
        return found[0] if len(found) == 1 else tuple(found)

    def specialize(self, partitions: Sequence[tuple[Callable[..., None], Sequence[Any]]], warps: Any, registers: Any) -> None:
        errors: list[BaseException] = []

        def run(function: Callable[..., None], args: Sequence[Any]) -> None:
            try:
                function(*args)
                assert not self.warps.pending, "a product that nobody waited for"
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Any:
    offsets = numbers(pointer.offset)
    if mask is None:
        return numbers(pointer.memory[offsets])
    found = pointer.memory[torch.where(mask, offsets, 0)]
    return numbers(torch.where(mask, found, torch.tensor(other, dtype=found.dtype)))


def store(pointer: Pointer, value: Any, mask: Any) -> None:
    chosen = mask.expand(pointer.offset.shape)
    pointer.memory[pointer.offset[chosen]] = value[chosen].as_subclass(torch.Tensor)


def allocate(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
    if layout == "barriers":
        return Barriers(Barrier() for _ in range(shape[0]))
    return Shared(torch.full(tuple(shape), math.nan, dtype=dtype), shape)


def fetch(descriptor: Any, corner: Sequence[Any], barrier: Barrier, into: Shared) -> None:
    row, column = map(int, corner)
    rows, columns = descriptor.block_shape
    box = descriptor.rows[row : row + rows, column : column + columns]
    assert box.shape == (rows, columns), "a copy from outside of the pool"
    into.store(box)
    barrier.change(0, -box.numel() * box.element_size())


def run_launch(launch: Launch, module: ModuleType, grid: tuple[int, int]) -> None:
    """Every program of a launch, one after the other. Mutates: its outputs."""
    params = {param.name: param for param in launch.kernel.params}
    arguments = {name: value if params[name].is_constexpr else _argument(value) for name, value in launch.arguments.items()}
    for program in ((x, y) for x in range(grid[0]) for y in range(grid[1])):
        functions = dict(vars(module))
        machine = Machine(program, grid, functions)
        for name, value in vars(module).items():
            if isinstance(value, type(launch.kernel)):
                functions[name] = FunctionType(value.fn.__code__, functions, name, value.fn.__defaults__)
            elif type(value).__name__ == "constexpr":
                functions[name] = value.value
        functions |= {
            "gl": machine.language,
            "warpgroup_mma": machine.multiply,
            "warpgroup_mma_wait": machine.wait_for_products,
            "fence_async_shared": lambda: None,
            "tma": SimpleNamespace(async_copy_global_to_shared=fetch),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: "barriers",
                init=lambda barrier, count: setattr(barrier, "count", count),
                expect=lambda barrier, num_bytes: barrier.change(1, num_bytes),
                arrive=lambda barrier: barrier.change(1, 0),
                wait=lambda barrier, parity: barrier.wait(parity),
            ),
        }
        functions[launch.name](**arguments)


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer(value.view(-1))
    if hasattr(value, "block_shape"):
        rows = torch.as_strided(value.base, tuple(value.shape), tuple(value.strides), value.base.storage_offset())
        return SimpleNamespace(rows=rows, block_shape=value.block_shape, layout=None, dtype=value.base.dtype)
    return numbers(value)

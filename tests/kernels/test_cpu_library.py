"""Loading the compiled CPU kernels, doing without them, and what their functions leave alone around their outputs."""

from __future__ import annotations

import ctypes
import time
from contextlib import suppress
from ctypes import addressof
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.cpu import ops as ops_module
from kernels.cpu.library import Draw, load
from kernels.cpu.ops import ISA_VARIABLE, cpu_ops
from kernels.cpu.packed import PackedStrips, pack_groups, pack_strips
from kernels.linear.reference import quantize_grouped, quantize_int8
from kernels.reference_ops import reference_ops
from tests.kernels.cpu_inputs import ISAS, copied, needs_library, packed, paged_batch, random_kv, random_layer

GUARD = 12345.0
THREADS = Path("/proc/self/task")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@needs_library
def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="sse9"):
        cpu_ops("sse9")
    monkeypatch.setenv(ISA_VARIABLE, "sse9")
    with pytest.raises(ValueError, match="sse9"):
        cpu_ops()
    monkeypatch.setenv(ISA_VARIABLE, "generic")
    assert cpu_ops().name == "cpu"


def test_without_the_library_everything_still_runs(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.setattr(ops_module, "load", lambda: None)
    ops, reference = cpu_ops(), reference_ops()
    for out, width in ((70, 92), (30, 2500)):
        weight = quantize_int8(torch.randn(out, width, generator=generator))
        x = torch.randn(9, width, generator=generator)
        table = ops.pack(weight)
        assert torch.equal(ops.linear(x, table), reference.linear(x, weight))
        assert torch.equal(ops.linear(x[3:4], table), reference.linear(x, weight)[3:4])
        assert torch.equal(
            ops.embed(torch.tensor([3, 0]), table, torch.float32), reference.embed(torch.tensor([3, 0]), weight, torch.float32)
        )
    weights = random_layer(generator)
    batch, positions = paged_batch([(3, 1), (0, 5)], 4, 10, generator)
    kv = random_kv(batch, (10, 2, 4, 48), torch.bfloat16, generator)
    x = torch.randn(6, 92, generator=generator)
    expected, _ = reference.qkv(x, None, weights, positions, copied(kv))
    assert torch.equal(ops.qkv(x, None, packed(weights, ops), positions, kv)[0], expected)


def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(output, whole): a contiguous output in the middle of guard numbers."""
    count = torch.Size(shape).numel()
    whole = torch.full((count + 128,), GUARD).to(dtype)
    return whole[64 : 64 + count].view(shape), whole


def is_intact(whole: Tensor) -> bool:
    return bool((whole[:64] == GUARD).all() and (whole[-64:] == GUARD).all())


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_written_around_an_output(isa: str, generator: torch.Generator) -> None:
    library = load()
    assert library is not None
    context = library.braid_create(isa.encode(), 2, 50)
    try:
        _write_everything(library, context, generator)
    finally:
        library.braid_destroy(context)


def _write_everything(library: ctypes.CDLL, context: int, generator: torch.Generator) -> None:
    for num_rows, out, width, bits in ((1, 33, 7, 0), (5, 47, 92, 0), (13, 1, 20, 0), (1, 33, 32, 4), (5, 47, 96, 8), (13, 1, 64, 4)):
        dense = torch.randn(out, width, generator=generator)
        weight = pack_groups(quantize_grouped(dense, bits)) if bits else pack_strips(quantize_int8(dense))
        assert isinstance(weight.packed, PackedStrips)
        matrix = addressof(weight.packed.matrix)
        x = torch.randn(num_rows, max(width, 2 * out), generator=generator)

        y, whole = guarded(num_rows, out)
        assert library.braid_linear(context, matrix, x[:, :width].contiguous().data_ptr(), y.data_ptr(), num_rows) == 0
        assert is_intact(whole)
        assert not (y == GUARD).any()

        rows, whole = guarded(num_rows, width)
        ids = torch.randint(out, (num_rows,), generator=generator)
        assert library.braid_embed(context, matrix, ids.data_ptr(), rows.data_ptr(), num_rows) == 0
        assert is_intact(whole)

        halves = x[:, : 2 * out].contiguous()
        product, whole = guarded(num_rows, out)
        assert library.braid_gated(context, halves.data_ptr(), product.data_ptr(), num_rows, out, 0) == 0
        assert is_intact(whole)

        rows = x[:, :width].contiguous()
        norm = torch.ones(width)
        (normed, whole), (total, whole_total) = guarded(num_rows, width), guarded(num_rows, width)
        status = library.braid_rms_norm(
            context, rows.data_ptr(), rows.data_ptr(), norm.data_ptr(), 1e-5, normed.data_ptr(), total.data_ptr(), num_rows, width
        )
        assert status == 0
        assert is_intact(whole)
        assert is_intact(whole_total)

        ones, zeros = torch.ones(num_rows), torch.zeros(num_rows, dtype=torch.int64)
        top_k = torch.full((num_rows,), 3, dtype=torch.int32)
        parameters = (ones, ones * 0.9, ones * 0.01, top_k, zeros, zeros)
        draw = Draw(*(t.data_ptr() for t in parameters))
        drawn, whole = guarded(num_rows, dtype=torch.int64)
        assert library.braid_sample(context, rows.data_ptr(), addressof(draw), drawn.data_ptr(), num_rows, width) == 0
        assert is_intact(whole)
        assert ((drawn >= 0) & (drawn < width)).all()


def _product(library: ctypes.CDLL, context: int, generator: torch.Generator) -> None:
    """Enough work for every thread to take some."""
    weight = pack_strips(quantize_int8(torch.randn(1024, 256, generator=generator)))
    assert isinstance(weight.packed, PackedStrips)
    x, y = torch.randn(64, 256, generator=generator), torch.empty(64, 1024)
    assert library.braid_linear(context, addressof(weight.packed.matrix), x.data_ptr(), y.data_ptr(), 64) == 0


@needs_library
def test_threads_park_soon_after_their_work(generator: torch.Generator) -> None:
    """They spin for 50 microseconds here; threads that never parked would use as many seconds as there are cores."""
    library = load()
    assert library is not None
    context = library.braid_create(b"", 4, 50)
    try:
        _product(library, context, generator)
        before = time.process_time()
        time.sleep(1)
        assert time.process_time() - before < 0.05
        _product(library, context, generator)  # and wake again
    finally:
        library.braid_destroy(context)


@needs_library
@pytest.mark.skipif(not THREADS.exists(), reason="only Linux lists a process's threads there")
def test_no_thread_outlives_its_context(generator: torch.Generator) -> None:
    library = load()
    assert library is not None
    before = _pool_threads()  # of contexts that earlier tests keep
    for turn in range(40):
        context = library.braid_create(b"", 5, 50)
        if turn % 2:  # half of them are gone before their threads have seen any work
            _wait_for_threads(before, 4)
            _product(library, context, generator)
        library.braid_destroy(context)
    _wait_for_threads(before, 0)


def _pool_threads() -> set[str]:
    """This process's threads that bear the pool's name."""
    found = set()
    for thread in THREADS.iterdir():
        with suppress(OSError):  # ended meanwhile
            if (thread / "comm").read_text().strip() == "braid-cpu":
                found.add(thread.name)
    return found


def _wait_for_threads(before: set[str], number: int) -> None:
    """A thread has its name soon after it began, and a joined one is listed until the system has buried it."""
    end = time.monotonic() + 10
    while len(_pool_threads() - before) != number:
        assert time.monotonic() < end, f"{_pool_threads() - before} where {number} were expected"
        time.sleep(0.01)

"""Every CPU kernel by itself, at the shapes of SmolLM2-135M: how long a call takes, and what share of the machine's limit that is.

    python -m bench.kernels --json kernels.json           the best instruction set of this machine; --isa avx2 or generic for another

The limit of a call is the longer of two times: that in which memory is read as fast as `bench.probe` reads it (the bytes that must move:
weights, K/V and activations, each once), and that in which the arithmetic is done at the probed rate. Weights and K/V are those of 30
layers in turn, as in a step: they come from memory unless the processor's last cache holds all 106 MB, as some servers' do, and what went
before leaves activations in nearer ones. A share above 1 says that a cache helped. Times include the call from Python, some microseconds.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click
import torch
from torch import Tensor

from bench.cpu_step import BLOCK_SIZE, Model, Shape, batch_of
from bench.probe import arithmetic_rate, describe_machine, int8_rate, read_bandwidth
from kernels.cpu.ops import cpu_ops
from kernels.ops import GROUP, GroupedWeight, SampleRows, Weight

ROWS = (1, 4, 16, 64, 512)
DECODES = ((16, 200), (1, 4096), (16, 1024))
PREFILL = 512
SAMPLED = (1, 16, 64)
_LEAST_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Case:
    """call takes the index of a layer, 0 ... copies - 1. num_bytes must move at least, num_operations be done (a product and its sum are
    two), in a call."""

    kernel: str
    name: str
    call: Callable[[int], object]
    copies: int
    num_bytes: float
    num_operations: int = 0
    arithmetic: Literal["int8", "float32"] = "float32"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and operations a second."""

    read: float
    float32: float
    int8: float

    def seconds(self, case: Case) -> tuple[float, str]:
        """The least that a call can take, and what bounds it."""
        moving = case.num_bytes / self.read
        computing = case.num_operations / (self.int8 if case.arithmetic == "int8" else self.float32)
        return max((moving, "memory"), (computing, "arithmetic"))


@dataclass(frozen=True, slots=True)
class Figure:
    """microseconds: median of repeats. share: of the limit, 1 is as fast as can be."""

    kernel: str
    case: str
    microseconds: float
    gigabytes_per_s: float
    gigaoperations_per_s: float
    share: float
    limit: str


def products(model: Model, rows: Sequence[int]) -> Iterator[Case]:
    """Quantised matrices, with the activations' quantisation."""
    kind = "int8" if model.bits == 8 else "int4"

    def case(name: str, weights: list[Weight], num_rows: int) -> Case:
        num_out, num_in, num_bytes = size_of(weights[0])
        x = torch.randn(num_rows, num_in)
        return Case(
            "linear",
            f"{kind} {name} {num_out} x {num_in}, {num_rows} rows",
            lambda at: model.ops.linear(x, weights[at]),
            len(weights),
            num_bytes + 4 * num_rows * (num_in + num_out),
            2 * num_rows * num_out * num_in,
            "int8",
        )

    for num_rows in rows:
        for name in ("qkv", "out", "gate_up", "down"):
            yield case(name, [getattr(layer, name) for layer in model.layers], num_rows)
        yield case("head", [model.table], num_rows)


def size_of(weight: Weight) -> tuple[int, int, float]:
    """Outputs, inputs, bytes."""
    if isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[1], weight.numel() * weight.itemsize
    num_out, num_in = weight.out_features, weight.in_features
    if isinstance(weight, GroupedWeight):
        return num_out, num_in, num_out * num_in * (weight.bits / 8 + 4 / GROUP)
    return num_out, num_in, num_out * (num_in + 4)


def attention(model: Model, decodes: Sequence[tuple[int, int]], prefill: int) -> Iterator[Case]:
    """decodes: sequences, each with a context of so many tokens. prefill: of one sequence from nothing."""
    shape = model.shape
    spec = model.layers[0].spec.attention
    works = [(f"decode, {count} x {context}", count, 1, context) for count, context in decodes]
    for name, count, length, context in (*works, (f"prefill, {prefill}", 1, prefill, prefill)):
        batch, _ = batch_of(count, length, context - length)
        kvs = model.kvs(batch)
        q = torch.randn(count * length, shape.heads, shape.head_width)
        # Of a prefill's pairs of tokens the mask leaves half.
        num_pairs = count * context if length == 1 else prefill * (prefill + 1) // 2
        num_bytes = 2 * count * context * shape.kv_heads * shape.head_width * model.kv_bytes() + 2 * q.numel() * 4
        yield Case(
            "attend",
            name,
            lambda at, q=q, kvs=kvs: model.ops.attend(q, kvs[at], spec),
            len(kvs),
            num_bytes,
            4 * num_pairs * shape.heads * shape.head_width,
        )


def row_works(model: Model, rows: Sequence[int]) -> Iterator[Case]:
    """What goes over activations row by row: norm, gate, K/V write, embedding."""
    shape, ops = model.shape, model.ops
    layer = model.layers[0]
    for num_rows in rows:
        words = f"{num_rows} rows"
        x, residual = torch.randn(num_rows, shape.width), torch.randn(num_rows, shape.width)
        yield Case(
            "rms_norm",
            words,
            lambda at, x=x, residual=residual: ops.rms_norm(x, residual, model.norm, 1e-5),
            1,
            4 * 4 * x.numel(),
            6 * x.numel(),
        )
        gate_up = torch.randn(num_rows, 2 * shape.wide)
        yield Case("gated", words, lambda at, gate_up=gate_up: ops.gated(gate_up, "silu"), 1, 6 * gate_up.numel(), 2 * gate_up.numel())
        batch, positions = batch_of(1, num_rows, 0) if num_rows > 64 else batch_of(num_rows, 1, 0)
        qkv = torch.randn(num_rows, shape.qkv_rows)
        kvs = model.kvs(batch)
        kv_numbers = 2 * shape.kv_heads * shape.head_width
        yield Case(
            "kv_write",
            words,
            lambda at, qkv=qkv, positions=positions, kvs=kvs: ops.kv_write(qkv, layer, positions, kvs[at]),
            len(kvs),
            num_rows * (4 * (2 * shape.qkv_rows - kv_numbers) + kv_numbers * model.kv_bytes()),
            3 * qkv.numel(),
        )
        ids = torch.randint(shape.vocab_size, (num_rows,))
        yield Case(
            "embed",
            words,
            lambda at, ids=ids: ops.embed(ids, model.table, torch.float32),
            1,
            5 * num_rows * shape.width,
            num_rows * shape.width,
        )


def sampling(model: Model, counts: Sequence[int]) -> Iterator[Case]:
    """Logits are read once at least; what drawing computes is not counted."""
    for count in counts:
        logits = 3 * torch.randn(count, model.shape.vocab_size)
        for name, temperature, top_k, top_p in (("greedy", 0.0, 0, 1.0), ("plain", 0.6, 0, 1.0), ("top-k 50, top-p 0.9", 0.6, 50, 0.9)):
            rows = sample_rows(count, temperature, top_k, top_p)
            yield Case(
                "sample",
                f"{name}, {count} x {model.shape.vocab_size}",
                lambda at, logits=logits, rows=rows: model.ops.sample(logits, rows),
                1,
                4 * logits.numel(),
            )


def draws(model: Model, counts: Sequence[int]) -> Iterator[Case]:
    """The head and the draw in one."""
    num_out, num_in, num_bytes = size_of(model.table)
    for count in counts:
        x = torch.randn(count, num_in)
        for name, temperature, top_k in (("greedy", 0.0, 0), ("plain", 0.6, 0), ("top-k 50", 0.6, 50)):
            rows = sample_rows(count, temperature, top_k, 1.0)
            yield Case(
                "draw",
                f"{name}, {count} x {num_out}",
                lambda at, x=x, rows=rows: model.ops.draw(x, model.table, rows),
                1,
                num_bytes + 4 * x.numel(),
                2 * count * num_out * num_in,
                "int8",
            )


def sample_rows(count: int, temperature: float, top_k: int, top_p: float) -> SampleRows:
    def same(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((count,), value, dtype=dtype)

    return SampleRows(
        temperature=same(temperature, torch.float32),
        top_k=same(top_k, torch.int32),
        top_p=same(top_p, torch.float32),
        min_p=same(0.0, torch.float32),
        seeds=torch.arange(count),
        positions=torch.arange(count),
    )


def time_case(case: Case, seconds: float) -> float:
    """Seconds of a call: median over rounds through all layers."""
    times = []
    end = time.perf_counter() + seconds
    for at in range(case.copies):
        case.call(at)
    while time.perf_counter() < end or len(times) < _LEAST_REPEATS:
        start = time.perf_counter()
        for at in range(case.copies):
            case.call(at)
        times.append((time.perf_counter() - start) / case.copies)
    return statistics.median(times)


def figure_of(case: Case, taken_s: float, limits: Limits) -> Figure:
    least_s, bound = limits.seconds(case)
    rates = (case.num_bytes / taken_s / 1e9, case.num_operations / taken_s / 1e9)
    return Figure(case.kernel, case.name, taken_s * 1e6, *rates, least_s / taken_s, bound)


def print_figure(figure: Figure) -> None:
    click.echo(
        f"{figure.kernel:>9} {figure.case:<32} {figure.microseconds:>10.1f} {figure.gigabytes_per_s:>8.1f} "
        f"{figure.gigaoperations_per_s:>8.0f} {figure.share:>7.2f}  {figure.limit}"
    )


def cases_of(
    models: Sequence[Model], rows: Sequence[int], decodes: Sequence[tuple[int, int]], prefill: int, counts: Sequence[int]
) -> Iterator[Case]:
    """models: of int8 rows, and of 4 bits in groups."""
    model = models[0]
    for one in models:
        yield from products(one, rows)
    yield from attention(model, decodes, prefill)
    yield from row_works(model, rows)
    yield from sampling(model, counts)
    yield from draws(model, counts)


def blocks_for(rows: Sequence[int], decodes: Sequence[tuple[int, int]], prefill: int) -> int:
    """That the largest case needs."""
    return max(*rows, prefill // BLOCK_SIZE + 1, *(count * (context // BLOCK_SIZE + 1) for count, context in decodes))


def plot_roofline(figures: Sequence[Figure], limits: Limits, title: str, path: Path) -> None:
    """Operations a second over operations a byte, below the two limits of each kind of arithmetic. Source: Williams et al. 2009."""
    from matplotlib.figure import Figure as Drawing  # takes a second to import

    drawing = Drawing(figsize=(8, 5), layout="constrained")
    axes = drawing.add_subplot()
    for kernel, kind, colour in (("linear", "int8 ", "C0"), ("linear", "int4 ", "C1"), ("attend", "", "C2")):
        own = [each for each in figures if each.kernel == kernel and each.case.startswith(kind)]
        intensities = [each.gigaoperations_per_s / each.gigabytes_per_s for each in own]
        axes.scatter(intensities, [each.gigaoperations_per_s for each in own], s=14, color=colour, label=f"{kernel} {kind}".strip())
    reach = [2.0**power for power in range(-1, 13)]
    for name, rate, style in (("int8 (nominal)", limits.int8, "-"), ("float32", limits.float32, "--")):
        axes.plot(reach, [min(limits.read * x, rate) / 1e9 for x in reach], "k" + style, linewidth=0.8, label=f"limit, {name}")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GOP/s", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    drawing.savefig(path, dpi=100)


@click.command(context_settings={"show_default": True})
@click.option("--isa", default="", show_default="the best one", help="avx512, avx2, neon or generic.")
@click.option("--threads", type=click.IntRange(1), default=torch.get_num_threads, show_default="one per core")
@click.option("--seconds", type=click.FloatRange(0), default=0.5, help="For each case.")
@click.option("--only", default="", show_default="all", help="A kernel: linear, attend, rms_norm, gated, kv_write, embed, sample, draw.")
@click.option("--tiny", "is_tiny", is_flag=True, help="Shapes that take no time, to see that everything runs.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here.")
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Draw a roofline of products and attention.")
def main(isa: str, threads: int, seconds: float, only: str, is_tiny: bool, json_path: Path | None, plot_path: Path | None) -> None:
    """Time the CPU kernels."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    machine = describe_machine() | {"load_before": os.getloadavg()[0]}
    rate = arithmetic_rate()
    limits = Limits(read_bandwidth(), rate, int8_rate(rate))
    click.echo(f"read {limits.read / 1e9:.1f} GB/s; float32 {limits.float32 / 1e9:.0f} GOP/s, int8 {limits.int8 / 1e9:.0f} (nominal)")
    try:
        ops = cpu_ops(isa, threads)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    sizes = ((1, 20), ((2, 20), (1, 40)), 24, (1, 3)) if is_tiny else (ROWS, DECODES, PREFILL, SAMPLED)
    shape = Shape(layers=2, width=64, heads=4, kv_heads=2, head_width=16, wide=96, vocab_size=96) if is_tiny else Shape()
    models = [Model(ops, blocks_for(*sizes[:3]), shape), Model(ops, 1, shape, bits=4)]
    # Our own threads do the work; PyTorch's would spin beside them, as in the server.
    torch.set_num_threads(1)
    click.echo(f"{'kernel':>9} {'case':<32} {'us':>10} {'GB/s':>8} {'GOP/s':>8} {'share':>7}  limit")
    figures = []
    with torch.inference_mode():
        for case in cases_of(models, *sizes):
            if only in ("", case.kernel):
                figures.append(figure_of(case, time_case(case, seconds), limits))
                print_figure(figures[-1])
    if plot_path is not None:
        plot_roofline(figures, limits, f"{machine['processor']}, {threads} threads, commit {machine['commit']}", plot_path)
    if json_path is not None:
        options = {"isa": isa, "threads": threads, "seconds": seconds}
        report = {
            "machine": machine,
            "options": options,
            "limits": asdict(limits),
            "figures": [asdict(each) for each in figures],
        }
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

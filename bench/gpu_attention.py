"""Part of `bench.gpu`: attention over paged keys and values, lines G1 to G4, beside torch's SDPA (each back end tried) and FlexAttention.

flash-attn is not among the baselines: it needs a build of its own. No correctness here: that is `gpu_correctness`.
Shape suffixes: S sequences, N query heads, K key/value heads, C context, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_clock import Clock, NotBuiltError
from bench.gpu_score import Line, Step, found, scored, steps_of, timed
from kernels.attention.cases import AttentionCase
from kernels.ops import AttentionSpec, PagedBatch, PagedKV, select_ops

LLAMA_8B = (32, 8, 128)
GEMMA_1B = (4, 1, 256)
TINY = (4, 2, 16)
Heads = tuple[int, int, int]


def paged(
    clock: Clock, sequences: list[tuple[int, int]], heads: Heads, block_size: int = 16, window: int | None = None
) -> tuple[Tensor, PagedKV]:
    """(q, kv): random queries, keys and values, made on the device. sequences: (query tokens, context). What a window hides is block 0
    again and again, so that a long context takes no memory behind its window."""
    num_heads, num_kv_heads, width = heads
    queries, contexts = [n for n, _ in sequences], [context for _, context in sequences]
    table = torch.zeros((len(sequences), max(-(-context // block_size) for context in contexts)), dtype=torch.int32)
    owned = [range(0 if window is None else max(0, c - n - window) // block_size, -(-c // block_size)) for n, c in sequences]
    order = torch.randperm(sum(map(len, owned))).int() + 1
    for row, blocks in enumerate(owned):
        first = sum(map(len, owned[:row]))
        table[row, blocks.start : blocks.stop] = order[first : first + len(blocks)]
    pool = torch.randn((2, len(order) + 1, num_kv_heads, block_size, width), dtype=clock.dtype, device=clock.device)
    batch = PagedBatch(
        slots=torch.full((sum(queries),), -1, dtype=torch.int64, device=clock.device),
        block_table=table.to(clock.device),
        query_start=torch.tensor([0, *queries]).cumsum(0).int().to(clock.device),
        context_len=torch.tensor(contexts, dtype=torch.int32, device=clock.device),
        num_decodes=queries.count(1),
        max_query_len=max((n for n in queries if n > 1), default=0),
        max_context_len=max(contexts),
    )
    return torch.randn((sum(queries), num_heads, width), dtype=clock.dtype, device=clock.device), PagedKV(pool[0], pool[1], batch)


def quantised(kv: PagedKV, kind: str) -> PagedKV:
    """The same in a pool of int8 or e4m3, with a scale for each head of a token. Raises: NotBuiltError."""
    dtype = found("kernels.kv_write.cases", "POOL_DTYPES")[kind]
    keys, values = ((x * 24).to(dtype) for x in (kv.keys, kv.values))
    scales = torch.full((2, *keys.shape[:-1]), 1 / 24, device=keys.device)
    return PagedKV(keys, values, kv.batch, scales[0], scales[1])


def variants_s(clock: Clock, q: Tensor, kv: PagedKV, spec: AttentionSpec) -> dict[str, Any]:
    """Seconds of attention without any variant, under "none", and by each that has to earn its place in verified.json; {} where there are
    no variants yet."""
    try:
        names, attend_by = (found("kernels.attention.variants", name) for name in ("VARIANTS", "attend_by"))
    except NotBuiltError:
        return {}
    return timed(
        clock,
        {name: lambda name=name: lambda: attend_by(frozenset({name} - {"none"}), q, kv, spec) for name in ("none", *names)},  # type: ignore[misc]
    )


def ours_s(clock: Clock, sequences: list[tuple[int, int]], heads: Heads, *, block_size: int = 16, window: int | None = None) -> float:
    q, kv = paged(clock, sequences, heads, block_size, window)
    spec = AttentionCase("", "", tuple(sequences), *heads, window=window).spec
    attend = select_ops("triton").attend
    return clock.in_graph_s(lambda: attend(q, kv, spec))


def variants_of(clock: Clock, sequences: list[tuple[int, int]], heads: Heads) -> dict[str, Any]:
    q, kv = paged(clock, sequences, heads)
    return variants_s(clock, q, kv, AttentionCase("", "", tuple(sequences), *heads).spec)


def limit_s(clock: Clock, sequences: list[tuple[int, int]], heads: Heads, window: int | None = None) -> float:
    """Every key and value that some query sees once, queries and outputs once, or the products; and one launch."""
    num_heads, num_kv_heads, width = heads
    seen = window or 1 << 30
    keys = sum(min(context, seen + queries - 1) for queries, context in sequences)
    pairs = sum(min(at + 1, seen) for queries, context in sequences for at in range(context - queries, context))
    tokens = sum(queries for queries, _ in sequences)
    num_bytes = clock.dtype.itemsize * width * (2 * keys * num_kv_heads + 2 * tokens * num_heads)
    return clock.rates.seconds(num_bytes=num_bytes, flops=4.0 * pairs * num_heads * width, kernels=1)


def sdpa(q_SNQH: Tensor, k_SKCH: Tensor, v_SKCH: Tensor, **options: Any) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Each back end of torch's attention over dense keys and values."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q_SNQH, k_SKCH, v_SKCH, enable_gqa=True, **options)

    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return {f"sdpa {backend.name.split('_')[0].lower()}": lambda backend=backend: partial(run, backend) for backend in backends}  # type: ignore[misc]


def with_best(baselines: dict[str, Any]) -> dict[str, Any]:
    """The fastest of SDPA's back ends besides."""
    times = [value for name, value in baselines.items() if name.startswith("sdpa") and isinstance(value, float)]
    return ({"sdpa best": min(times)} if times else {}) | baselines


def dense(clock: Clock, count: int, queries: int, context: int, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    num_heads, num_kv_heads, width = heads
    made = ((num_heads, queries), (num_kv_heads, context), (num_kv_heads, context))
    q, k, v = (torch.randn((count, h, n, width), dtype=clock.dtype, device=clock.device) for h, n in made)
    return q, k, v


def flex(clock: Clock) -> Any:
    """Compiled; on a CPU as it is, because compiling for one would need a C++ compiler and say nothing."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = flex_attention
    return torch.compile(attend, dynamic=False) if clock.is_gpu else attend


def flex_causal(clock: Clock, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    length = q.shape[2]
    mask = create_block_mask(lambda _b, _h, at, key: at >= key, None, None, length, length, device=str(clock.device))
    attend = flex(clock)
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)


def flex_paged(clock: Clock, count: int, context: int, heads: Heads) -> Callable[[], Any]:
    """A decode over pages of 128 tokens, with torch's own page table. Source: torch.nn.attention.experimental._paged_attention."""
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import create_block_mask, noop_mask

    num_heads, num_kv_heads, width = heads
    page = clock.sized(128, 16)
    num_pages = count * -(-context // page)
    tables = PagedAttention(num_pages, page, count, device=str(clock.device))
    for row in range(count):
        tables.reserve(torch.tensor(row, device=clock.device), torch.tensor(context, device=clock.device))
    logical = create_block_mask(noop_mask, count, 1, 1, context, device=str(clock.device), BLOCK_SIZE=page)
    mask = tables.convert_logical_block_mask(logical)
    q = torch.randn((count, num_heads, 1, width), dtype=clock.dtype, device=clock.device)
    k, v = (torch.randn((1, num_kv_heads, num_pages * page, width), dtype=clock.dtype, device=clock.device) for _ in range(2))
    attend = flex(clock)
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)


def decode_quantised(clock: Clock, count: int, context: int, kind: str) -> dict[str, Any]:
    """Beside the same from a plain pool."""
    heads, count, context = clock.sized((LLAMA_8B, count, context), (TINY, 2, 40))
    sequences = [(1, context)] * count
    q, plain = paged(clock, sequences, heads)
    kv, attend = quantised(plain, kind), select_ops("triton").attend
    spec = AttentionCase("", "", tuple(sequences), *heads).spec
    mine = clock.in_graph_s(lambda: attend(q, kv, spec))
    num_bytes = 2 * count * context * heads[1] * (heads[2] + 4)
    return scored(
        clock.rates.seconds(num_bytes=num_bytes, kernels=1), mine, {"plain pool": clock.in_graph_s(lambda: attend(q, plain, spec))}
    )


def decode(clock: Clock, count: int, context: int, block_size: int = 16) -> dict[str, Any]:
    heads, count, context = clock.sized((LLAMA_8B, count, context), (TINY, 2, 40))
    sequences = [(1, context)] * count
    mine = ours_s(clock, sequences, heads, block_size=block_size)
    clock.free()
    baselines = timed(clock, sdpa(*dense(clock, count, 1, context, heads)))
    clock.free()
    if (count, context) in ((64, 8192), (2, 40)):
        baselines |= timed(clock, {"flex paged": lambda: flex_paged(clock, count, context, heads)})
    return scored(limit_s(clock, sequences, heads), mine, with_best(baselines))


def decode_window(clock: Clock, count: int, context: int) -> dict[str, Any]:
    heads, count, context, window = clock.sized((GEMMA_1B, count, context, 512), (TINY, 2, 60, 24))
    sequences = [(1, context)] * count
    baselines: dict[str, Any] = {}
    if count * context <= 64 * 32_768:
        q, k, v = dense(clock, count, 1, context, heads)
        mask = (torch.arange(context, device=clock.device) >= context - window).view(1, 1, 1, -1)
        baselines = with_best(timed(clock, sdpa(q, k, v, attn_mask=mask)))
    return scored(limit_s(clock, sequences, heads, window), ours_s(clock, sequences, heads, window=window), baselines)


def decode_flat(clock: Clock) -> dict[str, Any]:
    """How much longer a local layer takes when the context is 128 times as long; 1 is flat."""
    heads, count, contexts, window = clock.sized((GEMMA_1B, 64, (1024, 131_072), 512), (TINY, 1, (40, 200), 24))
    short, long = (ours_s(clock, [(1, context)] * count, heads, window=window) for context in contexts)
    return scored(short, long, longer=long / short)


def prefill(clock: Clock, length: int, heads: Heads) -> dict[str, Any]:
    length, heads = clock.sized((length, heads), (20, TINY))
    sequences = [(length, length)]
    mine, variants = ours_s(clock, sequences, heads), variants_of(clock, sequences, heads)
    q, k, v = dense(clock, 1, length, length, heads)
    others = sdpa(q, k, v, is_causal=True) | {"flex": lambda: flex_causal(clock, q, k, v)}
    if length > 8192:
        del others["sdpa math"]  # it writes all scores: 34 GB of them
    baselines = timed(clock, others)
    flops = 2.0 * length * (length + 1) * heads[0] * heads[2]
    return scored(limit_s(clock, sequences, heads), mine, with_best(baselines), flops_per_s=flops / mine, variants=variants)


def mixed(clock: Clock, chunk: int, count: int, context: int) -> dict[str, Any]:
    """Beside two calls of SDPA, one for each kind, over dense keys: torch has no single call for both, and what transformers does without
    flash-attn is a mask of all tokens by all keys, which does not fit."""
    heads, chunk, count, context = clock.sized((LLAMA_8B, chunk, count, context), (TINY, 10, 2, 30))
    sequences = [(1, context)] * count + [(chunk, chunk)]
    mine, variants = ours_s(clock, sequences, heads), variants_of(clock, sequences, heads)
    clock.free()
    decodes = timed(clock, sdpa(*dense(clock, count, 1, context, heads)))
    clock.free()
    chunks = timed(clock, sdpa(*dense(clock, 1, chunk, chunk, heads), is_causal=True))
    both = [with_best(one).get("sdpa best") for one in (decodes, chunks)]
    baselines = {"sdpa best, two calls": sum(both)} if None not in both else {"sdpa": f"{decodes}; {chunks}"[:300]}  # type: ignore[arg-type]
    return scored(limit_s(clock, sequences, heads), mine, baselines, variants=variants)


LINES = (
    Line(
        "G1",
        "decode attention, 32 heads on 8, width 128",
        "keys and values / read bandwidth + a launch",
        0.70,
        0.92,
        {
            f"decode {count} x {context}, blocks of {block}": partial(decode, count=count, context=context, block_size=block)
            for count, context, block in (
                (64, 8192, 16),
                (1, 8192, 16),
                (1, 65_536, 16),
                (8, 8192, 16),
                (64, 1024, 16),
                (1, 1024, 16),
                (64, 8192, 64),
            )
        }
        | {f"decode 64 x 8192 of {kind}": partial(decode_quantised, count=64, context=8192, kind=kind) for kind in ("int8", "fp8")},
    ),
    Line(
        "G2",
        "decode attention of a local layer, 4 heads on 1, width 256, window 512",
        "keys and values in the window / read bandwidth + a launch",
        0.50,
        0.85,
        {
            "256 x 1024": partial(decode_window, count=256, context=1024),
            "64 x 32768": partial(decode_window, count=64, context=32_768),
            "1 x 32768": partial(decode_window, count=1, context=32_768),
            "1k against 128k": decode_flat,
        },
    ),
    Line(
        "G3",
        "causal prefill attention",
        "operations / measured bf16 rate",
        0.50,
        0.78,
        {
            "prefill 4096, width 128": partial(prefill, length=4096, heads=LLAMA_8B),
            "prefill 16384, width 128": partial(prefill, length=16_384, heads=LLAMA_8B),
            "prefill 4096, width 256": partial(prefill, length=4096, heads=GEMMA_1B),
        },
        cap_s=40,
    ),
    Line(
        "G4",
        "a chunk of 2,048 beside 128 decodes of 4,096, 32 heads on 8, width 128",
        "the larger of operations / bf16 rate and keys and values / read bandwidth, + a launch",
        0.50,
        0.80,
        {"mixed 2048 + 128 x 4096": partial(mixed, chunk=2048, count=128, context=4096)},
    ),
)


def steps(clock: Clock) -> list[Step]:
    return steps_of(clock, LINES)

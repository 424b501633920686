"""The one dispatch point between a model and the code that computes it.

What lives here: the values that cross the line (specs, weights, paged K/V, sampling rows), the `Ops` table of callables with each
contract written once, and `select_ops`. What must not: a formula, a model family, a request. Called by `service/model`,
`service/runner`, training, tests and benchmarks. Long, because every contract of the line stands here and nowhere else.

Shape suffixes: T tokens, S sequences, D model width, N query heads, K key/value heads, H head width, F feed-forward width,
B blocks in the pool, P places in a block, W blocks in the widest table, R sampled rows, V vocabulary, G groups of layers with block
tables of their own, N rows of the state between steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """Which codes of its own picture a code sees: those near the code that comes next, because that is the one it predicts.

    Codes lie in rows of `columns`. The query that is code i of its picture sees code k <= i of it when k == i, or when
    row(i + 1) - row(k) <= row_radius and |column(i + 1) - column(k)| <= column_radius.
    """

    columns: int
    row_radius: int
    column_radius: int


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Which keys a query may see, as data. A query at position p sees a key at position j when j <= p and
    (window is None or p - j < window or j < sink), and, with a neighbourhood, when besides j is not a code of the query's own
    picture or is one that the neighbourhood holds. `PagedBatch.grid_start` says which tokens are codes.

    window: tokens a query sees, itself included; None sees all. sink: first positions that stay visible behind the window.
    scale: factor on q.k. softcap: c > 0 replaces a score s by c * tanh(s / c); 0 is off.
    """

    scale: float
    window: int | None = None
    sink: int = 0
    softcap: float = 0.0
    neighbourhood: Neighbourhood | None = None


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The numbers of one decoder layer that its kernels need."""

    num_heads: int
    num_kv_heads: int
    head_width: int
    attention: AttentionSpec
    norm_eps: float
    activation: Activation


@dataclass(frozen=True, eq=False, slots=True)
class Int8Weight:
    """A matrix [out, in] as int8 with one scale per output row: weight ~ values * scales[:, None].

    packed: the back end's own form of the same numbers, made by `Ops.pack`; None before that. A back end may drop `values`
    (leave it an empty tensor) once it has packed them.
    """

    out_features: int
    in_features: int
    values: Tensor  # int8 [out, in]
    scales: Tensor  # float32 [out]
    packed: object | None = None


GROUP = 32
"""Inputs that share a scale in a `GroupedWeight`."""


@dataclass(frozen=True, eq=False, slots=True)
class GroupedWeight:
    """A matrix [out, in] as unsigned whole numbers of `bits` bits (4 or 8), with a scale and an offset for every 32 inputs of an output:
    weight ~ values * scale + offset. The blocks of GGUF's Q4_0, Q4_1 and Q8_0 are this, number by number.

    Products quantise x to int8 with a scale for every 32 inputs too; a back end may keep x as it is, which is more exact. packed: as in
    `Int8Weight`.
    """

    out_features: int
    in_features: int
    bits: int
    values: Tensor  # uint8 [out, in]
    scales: Tensor  # float16 [out, in / 32]
    offsets: Tensor  # float16 [out, in / 32]
    packed: object | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Fp8Weight:
    """A matrix [out, in] as 8-bit floats with one scale per output row: weight ~ values * scales[:, None]. No value is NaN.

    Products keep x as it is; a back end may quantise each row of x by its own scale where the rows are many. packed: as in `Int8Weight`.
    """

    out_features: int
    in_features: int
    values: Tensor  # float8_e4m3fn [out, in]
    scales: Tensor  # float32 [out]
    packed: object | None = None


Weight = Tensor | Int8Weight | GroupedWeight | Fp8Weight
"""A matrix [out, in]: dense, or quantised."""


@dataclass(frozen=True, eq=False, slots=True)
class SharedExpert:
    """A feed-forward block that every token passes beside its own experts: gate_up [2S, D] and down [D, S], S its own width."""

    gate_up: Weight
    down: Weight


@dataclass(frozen=True, eq=False, slots=True)
class ExpertWeights:
    """A feed-forward block of E experts, of which each token passes `top_k`. Source: kernels/experts/reference.py.

    router, dense [E, D], gives a token's logits; with a shared expert it is [E + 1, D], and the sigmoid of the last one is the factor of
    what that expert gives. gate_up [E * 2F, D] holds the experts one below the other, each its gate rows, then its up rows; down
    [E * D, F] likewise. is_normalised: the shares of a token's experts add up to 1, instead of those of all experts.
    """

    router: Tensor
    gate_up: Weight
    down: Weight
    num_experts: int
    top_k: int
    is_normalised: bool
    shared: SharedExpert | None = None


@dataclass(frozen=True, eq=False, slots=True)
class LayerWeights:
    """The parameters of one decoder layer, and the rotary table of its base.

    qkv [(N + 2K) * H, D] and qkv_bias [(N + 2K) * H] hold the query, key and value rows in this order; gate_up [2F, D] the gate
    rows, then the up rows; rotary [positions, 2, H / 2] float32 cos then sin; q_norm and k_norm [H]; out_norm and down_norm [D], of
    models that also norm what `out` and `down` give before it is added to the residual. experts: what the layer has in the place of one
    feed-forward block; gate_up and down are then those of `experts`, all of them.
    """

    spec: LayerSpec
    attention_norm: Tensor  # [D]
    qkv: Weight
    out: Weight  # [D, N * H]
    mlp_norm: Tensor  # [D]
    gate_up: Weight
    down: Weight  # [D, F]
    rotary: Tensor
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    out_norm: Tensor | None = None
    down_norm: Tensor | None = None
    experts: ExpertWeights | None = None


@dataclass(eq=False, slots=True)
class PagedBatch:
    """Where the tokens of one step live, for one group of layers. Sequences with exactly one query token come first.

    slots int64 [T]: block * P + offset that a token's K/V goes to; -1 writes nothing (padding).
    block_table int32 [S, W]: entry i holds positions i * P ... i * P + P - 1; entries that the mask hides may hold anything valid.
    query_start int32 [S + 1]: tokens of sequence s are rows query_start[s] ... query_start[s + 1] - 1.
    context_len int32 [S]: tokens of the sequence once this step is written, its query tokens included; 0 for a padded row.
    num_decodes: how many leading sequences have one query token. max_query_len: the longest of the others, 0 with none.
    max_context_len: an upper bound of context_len known on the host (for a graph: the captured maximum).
    grid_start int32 [T]: where the picture that a token is a code of begins (the position of its first code), -1 for other tokens;
    None when no token is a code.
    """

    slots: Tensor
    block_table: Tensor
    query_start: Tensor
    context_len: Tensor
    num_decodes: int
    max_query_len: int
    max_context_len: int
    grid_start: Tensor | None = None


@dataclass(eq=False, slots=True)
class PagedKV:
    """One layer's keys and values in the paged pool, and where this step's tokens are.

    keys, values [B, K, P, H] (views of the pool: only the last dimension is sure to be contiguous; blocks may be strided).
    key_scales, value_scales: float32 [B, K, P], what the numbers of a pool of int8 or float8_e4m3fn are multiplied by; None for others.
    """

    keys: Tensor
    values: Tensor
    batch: PagedBatch
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


@dataclass(eq=False, slots=True)
class SampleRows:
    """What one sampling call needs beside the logits, a row per sampled sequence. All tensors lie on the logits' device.

    temperature float32 [R], 0 picks the arg-max. top_k int32 [R], 0 is off. top_p float32 [R], 1 is off. min_p float32 [R], 0 is off.
    seeds, positions int64 [R]: the noise of a row is a function of (seed, position, token) and of nothing else.
    mask int32 [R, ceil(V / 32)] or None: bit (v % 32) of word (v // 32) set means that token v is allowed.
    counts int32 [R, V] or None: how often the sequence has generated v; `seen` bool [R, V] or None: v is in prompt or output.
    repetition (1 is off), presence, frequency (0 is off) float32 [R]; read only when `counts` and `seen` are given.
    num_top: how many of the likeliest tokens to report with their logprobs; 0 reports none. logprobs: report any at all.
    is_filtered: may a row that is not greedy have top_k, top_p or min_p on? Known to the host, which must not wait for the tensors.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor
    mask: Tensor | None = None
    counts: Tensor | None = None
    seen: Tensor | None = None
    repetition: Tensor | None = None
    presence: Tensor | None = None
    frequency: Tensor | None = None
    num_top: int = 0
    logprobs: bool = False
    is_filtered: bool = True


@dataclass(frozen=True, eq=False, slots=True)
class Sampled:
    """ids int64 [R]; logprobs float32 [R] of the chosen ids; top_ids int64 and top_logprobs float32 [R, num_top], likeliest first.

    Logprobs are the log-softmax of the logits as the model gave them, before penalties, mask and temperature. None where not asked.
    """

    ids: Tensor
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Ops:
    """A back end: every callable a model step needs. A coarse op is *defined* as its composition of fine ops; a back end may
    override the coarse op with a fused one, or only the fine ones (`kernels/compose.py` builds the former from the latter).

    Coarse, three a layer. `residual` may be updated in place: use only the returned one.
      qkv(x [T, D], residual [T, D] or None, weights, positions int64 [T], kv) -> (q [T, N, H], residual [T, D])
          residual = residual + x (x itself when None); RMSNorm; product (+ bias); q/k norm; rotary; K and V written into kv.
      attend(q [T, N, H], kv, spec) -> y [T, N * H]
      out_mlp(y [T, N * H], residual, weights) -> (x [T, D], residual)
          residual = residual + out_norm(out(y)); RMSNorm; x = down_norm(down(gated(gate_up(norm)))), without out_norm and down_norm
          where weights has none, or down_norm(experts(norm)) where it has experts. The caller adds x at the next norm.
    Coarse, one a step.
      layers(x [T, D], weights, positions int64 [T], kv) -> (x [T, D], residual [T, D]): the three above for each layer's weights and kv
          in turn, which a back end may do in one call (`stack`).
      draw(x [R, D], head [V, D], rows) -> Sampled: sample(linear(x, head)), whose logits a back end need not write.
    Fine.
      linear(x [M, in], weight) -> [M, out], x's dtype; an int8 weight quantises each row of x by its own scale, so that a row's
          result is bit-equal whatever the other rows are. What the other weights do with x stands with them.
      embed(ids int64 [T], weight [V, D], dtype) -> [T, D]
      rms_norm(x [T, D], residual or None, weight [D], eps) -> (normed [T, D], residual [T, D])
      kv_write(qkv [T, (N + 2K) * H], weights, positions, kv) -> q [T, N, H]
          the product's rows split, normed, rotated (half-split pairs: i with i + H/2), K/V stored. Mutates: kv.keys, kv.values.
      gated(gate_up [T, 2F], activation) -> [T, F]
      experts(x [T, D], weights, activation) -> [T, D]
          the sum over a token's experts, in the order of their shares, of share * down(gated(gate_up(x))), and the shared expert's.
      sample(logits float32 [R, V], rows) -> Sampled. Source of the noise: kernels/sample/reference.py.
    Set-up.
      pack(weight) -> weight: once per matrix at load; brings it into the form `linear` reads fastest.
      step: what prepares a step's inputs on the device; None where steps are prepared by the host alone.
    """

    name: str
    qkv: Callable[[Tensor, Tensor | None, LayerWeights, Tensor, PagedKV], tuple[Tensor, Tensor]]
    attend: Callable[[Tensor, PagedKV, AttentionSpec], Tensor]
    out_mlp: Callable[[Tensor, Tensor, LayerWeights], tuple[Tensor, Tensor]]
    linear: Callable[[Tensor, Weight], Tensor]
    embed: Callable[..., Tensor]
    rms_norm: Callable[[Tensor, Tensor | None, Tensor, float], tuple[Tensor, Tensor]]
    kv_write: Callable[[Tensor, LayerWeights, Tensor, PagedKV], Tensor]
    gated: Callable[[Tensor, Activation], Tensor]
    experts: Callable[[Tensor, ExpertWeights, Activation], Tensor]
    sample: Callable[[Tensor, SampleRows], Sampled]
    draw: Callable[[Tensor, Weight, SampleRows], Sampled]
    pack: Callable[[Weight], Weight]
    stack: Stack | None = None
    step: StepOps | None = None

    def layers(self, x_TD: Tensor, weights: Sequence[LayerWeights], positions_T: Tensor, kv: Sequence[PagedKV]) -> tuple[Tensor, Tensor]:
        # Whoever replaced one of the three is not passed over.
        if self.stack is not None and self.stack.fuses == (self.qkv, self.attend, self.out_mlp):
            done = self.stack.run(x_TD, weights, positions_T, kv)
            if done is not None:
                return done
        residual_TD: Tensor | None = None
        for one, its_kv in zip(weights, kv, strict=True):
            q, residual_TD = self.qkv(x_TD, residual_TD, one, positions_T, its_kv)
            x_TD, residual_TD = self.out_mlp(self.attend(q, its_kv, one.spec.attention), residual_TD, one)
        if residual_TD is None:
            raise ValueError("a model has at least one layer")
        return x_TD, residual_TD


@dataclass(frozen=True, slots=True)
class Stack:
    """All layers in one call. fuses: the coarse ops of a layer, in order, that `run` is the same as; it gives None for what it can't."""

    fuses: tuple[Callable[..., object], Callable[..., object], Callable[..., object]]
    run: Callable[[Tensor, Sequence[LayerWeights], Tensor, Sequence[PagedKV]], tuple[Tensor, Tensor] | None]


@dataclass(eq=False, slots=True)
class StepState:
    """What the device keeps of live sequences, a row each, from step to step.

    ids int64 [N]: the id that was drawn last. tables int32 [G, N, W]: block tables by K/V group; every entry is a valid block, also
    those that no sequence has set.
    """

    ids: Tensor
    tables: Tensor


@dataclass(eq=False, slots=True)
class StepRows:
    """Inputs of a step whose S rows have one token each, at addresses that never change, for all G K/V groups; the fields are those of
    `PagedBatch`. Rows of a tensor are contiguous, tensors may be strided: the first S rows of larger ones.

    ids, positions int64 [S]; slots int64 [G, S]; context_len, grid_start int32 [S]; block_table int32 [G, S, W].
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    context_len: Tensor
    grid_start: Tensor
    block_table: Tensor


@dataclass(frozen=True, slots=True)
class StepOps:
    """Kernels around a captured step. Neither waits for the device.

    apply(tables int32 [G, N, W], updates int64 [2, n]): tables.view(-1)[updates[0]] = updates[1]; no place comes twice. Mutates: tables.
    prepare(numbers int32 [5 + 2 * G, S], state, rows, block_size): writes the inputs of a step out of what the host says of its rows.
        numbers: by row, in the order of `kernels.step.reference`: the row of its sequence in the state (-1 for a padded row, whose other
        numbers mean nothing), the position of its token, the token (negative: the id that was drawn last for its sequence), whether its
        K/V are in their place already, and where the picture that it is a code of begins; then by group the column of the sequence's
        table in which there is a new block (-1 for none), then these blocks. Sequences are different ones.
        A padded row gets id 0, position 0, slot -1, context 0 and no picture. Of a block table as many entries are written as the
        context has blocks. Mutates: rows, and state.tables by the new blocks.
    """

    apply: Callable[[Tensor, Tensor], None]
    prepare: Callable[[Tensor, StepState, StepRows, int], None]


def select_ops(name: Literal["triton", "cpu", "reference"], deterministic: bool = False) -> Ops:
    """The named back end. Imports it here, late, because Triton or the compiled CPU library may be absent.

    deterministic: no row of any result may depend on the others, to the last bit. "triton" then multiplies by kernels of its own whatever
    the number of rows; the other back ends are as ever ("cpu" with its library computes each row by itself anyway).

    Raises: ValueError for an unknown name; ImportError when "triton" is not installed. "cpu" without its compiled library is
    plain PyTorch with stock int8 products, and says so once in the log.
    """
    if name == "reference":
        from kernels.reference_ops import reference_ops

        return reference_ops()
    if name == "cpu":
        from kernels.cpu.ops import cpu_ops

        return cpu_ops()
    if name == "triton":
        from kernels.triton_ops import triton_ops

        return triton_ops(deterministic)
    raise ValueError(f"unknown back end {name!r}; there are triton, cpu and reference")

"""What a decoder is, in numbers: one `ModelConfig` for every family. Read from a checkpoint by `families`, used by `transformer`,
`weights`, the runner's K/V cache and `braid plan`. No torch, no files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from service.errors import WeightsError
from service.vocabulary import PictureIds

ROUTERS = ("router", "shared_router")
"""Parts of a layer that are matrices and stay dense in every precision: they decide where a token goes, and are small."""
_MOST_EXPERTS = 4096


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama-3 style frequency scaling, or linear (factor alone). Source: Llama 3.1 release, `rope_scaling` of its config."""

    kind: str  # "linear" or "llama3"
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer's attention: window in tokens (None: all), sink positions, rotary base and its scaling, softcap (0: off), and, in a model
    with pictures, the rows and columns around a code that it sees of its own picture (None: all)."""

    window: int | None = None
    sink: int = 0
    rope_base: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    softcap: float = 0.0
    radius: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Experts:
    """Of the layers that have `count` experts in the place of one feed-forward block (is_sparse, one a layer): how many of them a token
    passes, how wide each is, whether a token's shares add up to 1, and the width of an expert for every token (0: none)."""

    count: int
    top_k: int
    width: int
    is_normalised: bool
    is_sparse: tuple[bool, ...]
    shared_width: int = 0

    def __post_init__(self) -> None:
        if not (0 < self.top_k <= self.count <= _MOST_EXPERTS and 0 < self.width < 2**31 and 0 <= self.shared_width < 2**31):
            raise WeightsError(
                f"the model's config has {self.count} experts of width {self.width}, {self.top_k} for a token, and a shared one of width "
                f"{self.shared_width}; between 1 and {_MOST_EXPERTS} are possible, of which a token gets at least one"
            )


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """layers holds one `LayerAttention` per decoder layer, so a hybrid local/global model is data. scale None: 1 / sqrt(head_width).
    pictures: which ids are codes; such a model adds a row's and a column's vector to the embedding of every code. has_post_norms: also what
    attention and the feed-forward block give is normed. embedding_scale: factor on embeddings, but not on the head they may be tied to.
    norm_offset: what the checkpoint leaves out of its norm weights. logit_softcap: c > 0 makes a logit s of the head c * tanh(s / c).
    experts: of a mixture of experts; feed_forward_width is that of the layers without."""

    vocab_size: int
    width: int
    feed_forward_width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    layers: tuple[LayerAttention, ...]
    max_context: int
    norm_eps: float = 1e-5
    activation: str = "silu"
    has_tied_head: bool = False
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    has_post_norms: bool = False
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    logit_softcap: float = 0.0
    scale: float | None = None
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pictures: PictureIds | None = None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "feed_forward_width", "num_heads", "num_kv_heads", "head_width", "max_context"):
            if not 0 < getattr(self, name) < 2**31:
                raise WeightsError(f"the model's config has {name} = {getattr(self, name)}; it must be a positive whole number")
        if not self.layers:
            raise WeightsError("the model's config has no layers")
        if self.experts is not None and len(self.experts.is_sparse) != len(self.layers):
            raise WeightsError(
                f"the model has {len(self.layers)} layers and says of {len(self.experts.is_sparse)} whether they have experts"
            )
        if self.num_heads % self.num_kv_heads:
            raise WeightsError(f"{self.num_heads} query heads can't be shared by {self.num_kv_heads} key/value heads")
        if self.head_width % 2:
            raise WeightsError(f"head_width {self.head_width} is odd; rotary embedding needs pairs")

    def with_max_context(self, tokens: int) -> ModelConfig:
        """The same model held to at most this many tokens. Raises: WeightsError when it was not made for so many."""
        if tokens > self.max_context:
            raise WeightsError(f"--max-context {tokens} is more than the model's own {self.max_context}")
        return replace(self, max_context=tokens)

    @property
    def attention_scale(self) -> float:
        return self.scale if self.scale is not None else 1 / math.sqrt(self.head_width)

    def experts_of(self, layer: int) -> Experts | None:
        """None for a layer with one feed-forward block."""
        return self.experts if self.experts is not None and self.experts.is_sparse[layer] else None

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in expected_shapes(self).values())

    @property
    def num_active_parameters(self) -> int:
        """That a token passes."""
        if self.experts is None:
            return self.num_parameters
        idle = (self.experts.count - self.experts.top_k) * 3 * self.width * self.experts.width
        return self.num_parameters - sum(self.experts.is_sparse) * idle


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this config has, by our name; matrices are [out, in]. Those of a layer's experts are one matrix, one
    expert's rows below the other's."""
    width = config.width
    queries, keys = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm": (width,),
        "q": (queries, width),
        "k": (keys, width),
        "v": (keys, width),
        "out": (width, queries),
        "mlp_norm": (width,),
    }
    rest: dict[str, tuple[int, ...]] = {}
    if config.has_qkv_bias:
        rest |= {"q_bias": (queries,), "k_bias": (keys,), "v_bias": (keys,)}
    if config.has_qk_norm:
        rest |= {"q_norm": (config.head_width,), "k_norm": (config.head_width,)}
    if config.has_post_norms:
        rest |= {"out_norm": (width,), "down_norm": (width,)}
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, width)}
    for index in range(len(config.layers)):
        parts = layer | _feed_forward_shapes(config, config.experts_of(index)) | rest
        shapes |= {f"layers.{index}.{name}": shape for name, shape in parts.items()}
    if config.pictures:
        shapes |= {"grid_rows": (config.pictures.rows, width), "grid_columns": (config.pictures.columns, width)}
    shapes["final_norm"] = (width,)
    if not config.has_tied_head:
        shapes["head"] = (config.vocab_size, width)
    return shapes


def _feed_forward_shapes(config: ModelConfig, experts: Experts | None) -> dict[str, tuple[int, ...]]:
    width = config.width
    if experts is None:
        wide = config.feed_forward_width
        return {"gate": (wide, width), "up": (wide, width), "down": (width, wide)}
    rows, shared = experts.count * experts.width, experts.shared_width
    shapes: dict[str, tuple[int, ...]] = {
        "router": (experts.count, width),
        "gate": (rows, width),
        "up": (rows, width),
        "down": (experts.count * width, experts.width),
    }
    if shared:
        shapes |= {
            "shared_gate": (shared, width),
            "shared_up": (shared, width),
            "shared_down": (width, shared),
            "shared_router": (1, width),
        }
    return shapes

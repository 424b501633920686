"""What a decoder is, in numbers: one `ModelConfig` for every family. Read from a checkpoint by `families`, used by `transformer`,
`weights`, the runner's K/V cache and `braid plan`. No torch, no files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from service.errors import WeightsError
from service.vocabulary import PictureIds


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
class ModelConfig:
    """layers holds one `LayerAttention` per decoder layer, so a hybrid local/global model is data. scale None: 1 / sqrt(head_width).
    pictures: which ids are codes; such a model adds a row's and a column's vector to the embedding of every code. has_post_norms: also what
    attention and the feed-forward block give is normed. embedding_scale: factor on embeddings, but not on the head they may be tied to.
    norm_offset: what the checkpoint leaves out of its norm weights."""

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
    scale: float | None = None
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pictures: PictureIds | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "feed_forward_width", "num_heads", "num_kv_heads", "head_width", "max_context"):
            if not 0 < getattr(self, name) < 2**31:
                raise WeightsError(f"the model's config has {name} = {getattr(self, name)}; it must be a positive whole number")
        if not self.layers:
            raise WeightsError("the model's config has no layers")
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

    @property
    def num_parameters(self) -> int:
        heads = (self.num_heads + 2 * self.num_kv_heads) * self.head_width
        per_layer = self.width * (heads + self.num_heads * self.head_width + 3 * self.feed_forward_width + 2)
        per_layer += heads if self.has_qkv_bias else 0
        per_layer += 2 * self.head_width if self.has_qk_norm else 0
        per_layer += 2 * self.width if self.has_post_norms else 0
        tables = 1 if self.has_tied_head else 2
        grid = self.width * (self.pictures.rows + self.pictures.columns) if self.pictures else 0
        return len(self.layers) * per_layer + tables * self.vocab_size * self.width + self.width + grid


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this config has, by our name; matrices are [out, in]."""
    width, wide = config.width, config.feed_forward_width
    queries, keys = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
    layer: dict[str, tuple[int, ...]] = {
        "attention_norm": (width,),
        "q": (queries, width),
        "k": (keys, width),
        "v": (keys, width),
        "out": (width, queries),
        "mlp_norm": (width,),
        "gate": (wide, width),
        "up": (wide, width),
        "down": (width, wide),
    }
    if config.has_qkv_bias:
        layer |= {"q_bias": (queries,), "k_bias": (keys,), "v_bias": (keys,)}
    if config.has_qk_norm:
        layer |= {"q_norm": (config.head_width,), "k_norm": (config.head_width,)}
    if config.has_post_norms:
        layer |= {"out_norm": (width,), "down_norm": (width,)}
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, width)}
    for index in range(len(config.layers)):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    if config.pictures:
        shapes |= {"grid_rows": (config.pictures.rows, width), "grid_columns": (config.pictures.columns, width)}
    shapes["final_norm"] = (width,)
    if not config.has_tied_head:
        shapes["head"] = (config.vocab_size, width)
    return shapes

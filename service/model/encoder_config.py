"""What an encoder of BERT's class is: its numbers, the names and shapes of its tensors, and how a folder describes one.

Reads JSON only; no tensor, no torch. Used by `encoder`, `weights`, the runner's loader and `braid plan`; decoders have `config` and
`families`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from service.checkpoint import find_checkpoint, read_json
from service.errors import WeightsError
from service.model.families import real, whole

ENCODER_FAMILIES = ("BertModel", "BertForMaskedLM")
ENCODER_NAMES = {
    "embedding": "embeddings.word_embeddings.weight",
    "positions": "embeddings.position_embeddings.weight",
    "kinds": "embeddings.token_type_embeddings.weight",
    "embedding_norm": "embeddings.LayerNorm.weight",
    "embedding_norm_bias": "embeddings.LayerNorm.bias",
    "layers.{}.q": "encoder.layer.{}.attention.self.query.weight",
    "layers.{}.q_bias": "encoder.layer.{}.attention.self.query.bias",
    "layers.{}.k": "encoder.layer.{}.attention.self.key.weight",
    "layers.{}.k_bias": "encoder.layer.{}.attention.self.key.bias",
    "layers.{}.v": "encoder.layer.{}.attention.self.value.weight",
    "layers.{}.v_bias": "encoder.layer.{}.attention.self.value.bias",
    "layers.{}.out": "encoder.layer.{}.attention.output.dense.weight",
    "layers.{}.out_bias": "encoder.layer.{}.attention.output.dense.bias",
    "layers.{}.attention_norm": "encoder.layer.{}.attention.output.LayerNorm.weight",
    "layers.{}.attention_norm_bias": "encoder.layer.{}.attention.output.LayerNorm.bias",
    "layers.{}.up": "encoder.layer.{}.intermediate.dense.weight",
    "layers.{}.up_bias": "encoder.layer.{}.intermediate.dense.bias",
    "layers.{}.down": "encoder.layer.{}.output.dense.weight",
    "layers.{}.down_bias": "encoder.layer.{}.output.dense.bias",
    "layers.{}.mlp_norm": "encoder.layer.{}.output.LayerNorm.weight",
    "layers.{}.mlp_norm_bias": "encoder.layer.{}.output.LayerNorm.bias",
}
ENCODER_PREFIX = "bert."
"""Stands before every name where the checkpoint was saved with a head on top."""
ENCODER_IGNORED = ("pooler.", "cls.", "embeddings.position_ids")
"""Heads that no vector goes through, and a table that follows from the config."""

_MOST_LAYERS = 4096
_ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh", "relu"]] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_POOLS: dict[str, Literal["mean", "cls"]] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Layers with a norm behind each half (post-norm), biases everywhere, learned positions and no causal mask. num_positions: that the
    checkpoint has; max_context: how many of them a text may use. num_kinds: token types, of which a text uses the first. pool: what
    makes the vector of a text out of those of its tokens."""

    vocab_size: int
    width: int
    feed_forward_width: int
    num_heads: int
    num_layers: int
    num_positions: int
    max_context: int
    num_kinds: int = 2
    norm_eps: float = 1e-12
    activation: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    pool: Literal["mean", "cls"] = "mean"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "feed_forward_width", "num_heads", "num_layers", "num_positions", "max_context", "num_kinds"):
            if not 0 < getattr(self, name) < 2**31:
                raise WeightsError(f"the model's config has {name} = {getattr(self, name)}; it must be a positive whole number")
        if self.num_layers > _MOST_LAYERS:
            raise WeightsError(f"the model's config has {self.num_layers} layers; between 1 and {_MOST_LAYERS} are possible")
        if self.width % self.num_heads:
            raise WeightsError(f"a width of {self.width} can't be cut into {self.num_heads} heads")
        if self.max_context > self.num_positions:
            raise WeightsError(f"texts of {self.max_context} tokens don't fit in the {self.num_positions} positions of the model")

    def within(self, tokens: int) -> EncoderConfig:
        """The same model for texts of at most so many tokens; 0, or more than it was made for, changes nothing."""
        return replace(self, max_context=tokens) if 0 < tokens < self.max_context else self

    @property
    def num_parameters(self) -> int:
        """Of the tensors that are read."""
        total = 0
        for shape in encoder_shapes(self).values():
            size = 1
            for length in shape:
                size *= length
            total += size
        return total


def encoder_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this config has, by our name; matrices are [out, in]."""
    width, wide = config.width, config.feed_forward_width
    layer: dict[str, tuple[int, ...]] = {}
    for name, shape in {"q": (width, width), "k": (width, width), "v": (width, width), "out": (width, width)}.items():
        layer |= {name: shape, f"{name}_bias": (width,)}
    layer |= {"up": (wide, width), "up_bias": (wide,), "down": (width, wide), "down_bias": (width,)}
    for name in ("attention_norm", "mlp_norm"):
        layer |= {name: (width,), f"{name}_bias": (width,)}
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (config.vocab_size, width),
        "positions": (config.num_positions, width),
        "kinds": (config.num_kinds, width),
        "embedding_norm": (width,),
        "embedding_norm_bias": (width,),
    }
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def read_encoder_config(path: Path) -> EncoderConfig | None:
    """The encoder that lies in a folder; None when what lies there is none, which a decoder's reader may then know.

    Raises: WeightsError when it is one and asks for something that is not built here; never guesses.
    """
    checkpoint = find_checkpoint(path)
    if checkpoint.kind != "folder":
        return None
    values = read_json(checkpoint.path / "config.json")
    architectures = values.get("architectures")
    if not isinstance(architectures, list) or not architectures or architectures[0] not in ENCODER_FAMILIES:
        return None
    _refuse_unbuilt(values)
    num_positions = whole(values, "max_position_embeddings")
    return EncoderConfig(
        vocab_size=whole(values, "vocab_size"),
        width=whole(values, "hidden_size"),
        feed_forward_width=whole(values, "intermediate_size"),
        num_heads=whole(values, "num_attention_heads"),
        num_layers=whole(values, "num_hidden_layers"),
        num_positions=num_positions,
        max_context=min(num_positions, _longest_text(checkpoint.path, num_positions)),
        num_kinds=whole(values, "type_vocab_size", 2),
        norm_eps=real(values, "layer_norm_eps", 1e-12),
        activation=_ACTIVATIONS[values.get("hidden_act", "gelu")],
        pool=_pool(checkpoint.path),
    )


def _refuse_unbuilt(values: Mapping[str, Any]) -> None:
    if str(values.get("hidden_act", "gelu")) not in _ACTIVATIONS:
        raise WeightsError(f"the model's activation is {values['hidden_act']!r}; supported are {', '.join(_ACTIVATIONS)}")
    if values.get("position_embedding_type", "absolute") != "absolute":
        raise WeightsError(f"the model's positions are {values['position_embedding_type']!r}; supported are absolute ones")
    if values.get("quantization_config"):
        raise WeightsError("the model's safetensors are quantised; supported are float32, float16 and bfloat16")
    if values.get("is_decoder"):
        raise WeightsError("the model's config has is_decoder = true, which is not supported")


def _longest_text(folder: Path, num_positions: int) -> int:
    """What the files of sentence-transformers say that the model was trained for; else all positions."""
    return whole(read_json(folder / "sentence_bert_config.json", default={}), "max_seq_length", num_positions)


def _pool(folder: Path) -> Literal["mean", "cls"]:
    """As the files of sentence-transformers say; the mean where they are missing, as that library would."""
    if any(folder.glob("*_Dense")):
        raise WeightsError("the model has a dense layer behind its pooling, which is not supported")
    said = read_json(folder / "1_Pooling" / "config.json", default={"pooling_mode_mean_tokens": True})
    chosen = [name for name, value in said.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in _POOLS:
        raise WeightsError(f"the model's vectors are made by {', '.join(chosen) or 'nothing'}; supported are {', '.join(_POOLS)}")
    return _POOLS[chosen[0]]

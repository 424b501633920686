"""Families of decoders: how each one's checkpoint describes itself, and what its tensors are called. A family is a reader of a config
and a table of names; there is no class and no file per family.

Reads metadata only (GGUF header, config.json), never weights, and needs no torch. Called by the runner's loader and by `braid plan`.
Long, because the same families come in two kinds of file that say the same in other words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from service.checkpoint import GGUFFile, GGUFTensor, find_checkpoint, open_gguf, read_json
from service.errors import WeightsError
from service.model.config import Experts, LayerAttention, ModelConfig, RopeScaling
from service.vocabulary import PictureIds

HF_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "grid_rows": "model.grid_rows.weight",
    "grid_columns": "model.grid_columns.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers.{}.attention_norm": "model.layers.{}.input_layernorm.weight",
    "layers.{}.q": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.k": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.v": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.{}.k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.{}.v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers.{}.q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "layers.{}.k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "layers.{}.out": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.up": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.down": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.router": "model.layers.{}.mlp.gate.weight",
    "layers.{}.shared_gate": "model.layers.{}.mlp.shared_expert.gate_proj.weight",
    "layers.{}.shared_up": "model.layers.{}.mlp.shared_expert.up_proj.weight",
    "layers.{}.shared_down": "model.layers.{}.mlp.shared_expert.down_proj.weight",
    "layers.{}.shared_router": "model.layers.{}.mlp.shared_expert_gate.weight",
}
"""A layer's experts are called as one block would be, once `experts_files` has made one matrix of them."""
GGUF_NAMES = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "layers.{}.attention_norm": "blk.{}.attn_norm.weight",
    "layers.{}.q": "blk.{}.attn_q.weight",
    "layers.{}.k": "blk.{}.attn_k.weight",
    "layers.{}.v": "blk.{}.attn_v.weight",
    "layers.{}.q_bias": "blk.{}.attn_q.bias",
    "layers.{}.k_bias": "blk.{}.attn_k.bias",
    "layers.{}.v_bias": "blk.{}.attn_v.bias",
    "layers.{}.q_norm": "blk.{}.attn_q_norm.weight",
    "layers.{}.k_norm": "blk.{}.attn_k_norm.weight",
    "layers.{}.out": "blk.{}.attn_output.weight",
    "layers.{}.mlp_norm": "blk.{}.ffn_norm.weight",
    "layers.{}.gate": "blk.{}.ffn_gate.weight",
    "layers.{}.up": "blk.{}.ffn_up.weight",
    "layers.{}.down": "blk.{}.ffn_down.weight",
    "layers.{}.router": "blk.{}.ffn_gate_inp.weight",
    "layers.{}.shared_gate": "blk.{}.ffn_gate_shexp.weight",
    "layers.{}.shared_up": "blk.{}.ffn_up_shexp.weight",
    "layers.{}.shared_down": "blk.{}.ffn_down_shexp.weight",
    "layers.{}.shared_router": "blk.{}.ffn_gate_inp_shexp.weight",
}
HF_POST_NORM_NAMES = {
    "layers.{}.out_norm": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.mlp_norm": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers.{}.down_norm": "model.layers.{}.post_feedforward_layernorm.weight",
}
"""Of a model that norms also behind attention and feed-forward block: one of the usual names means another norm there."""
GGUF_POST_NORM_NAMES = {
    "layers.{}.out_norm": "blk.{}.post_attention_norm.weight",
    "layers.{}.down_norm": "blk.{}.post_ffw_norm.weight",
}
HF_TEXT_PREFIXES = {"language_model.model.": "model.", "model.language_model.": "model.", "language_model.lm_head.": "lm_head."}
"""What stands before the names of a text model inside a larger one, and what is usual."""
HF_BESIDE_TEXT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
GGUF_FAMILIES = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3")  # Mistral and Mixtral: llama
GGUF_EXPERTS = {"llama": True, "qwen2moe": False, "qwen3moe": True}
"""Families that may have experts; do the shares of a token's add up to 1? No file says so (source: llama.cpp)."""
GGUF_INTERLEAVED = ("llama",)
"""Families whose query and key rows GGUF stores in the order that a rotary embedding of neighbouring pairs wants."""
GGUF_ROPE_FACTORS = "rope_freqs.weight"

_MOST_LAYERS = 4096
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_GGUF_UNBUILT = ("logit_scale", "residual_scale", "embedding_scale")
_GGUF_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def read_config(path: Path) -> ModelConfig:
    """The config of a GGUF file, or of a folder with config.json.

    Raises: WeightsError when it is of a family, or asks for something, that is not built here; never guesses.
    """
    checkpoint = find_checkpoint(path)
    if checkpoint.kind == "folder":
        return _read_folder(checkpoint.path)
    return read_gguf_config(open_gguf(checkpoint.path, with_tokens=False))


def whole(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """values[key] as an int. Raises: WeightsError when it is missing without a default, or no whole number."""
    value = values.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise WeightsError(f"the model's config has {key} = {value!r}; it must be a whole number")
    return value


def real(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """values[key] as a positive finite float. Raises: WeightsError."""
    value = values.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise WeightsError(f"the model's config has {key} = {value!r}; it must be a positive number")
    return float(value)


def _ids(value: object) -> tuple[int, ...]:
    """An id, a list of ids, or nothing."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(each, int) or isinstance(each, bool) or each < 0 for each in ids):
        raise WeightsError(f"the model's config has the token ids {value!r}; they must be whole numbers")
    return tuple(dict.fromkeys(ids))


def _num_layers(values: Mapping[str, Any], key: str) -> int:
    count = whole(values, key)
    if not 0 < count <= _MOST_LAYERS:
        raise WeightsError(f"the model's config has {key} = {count}; between 1 and {_MOST_LAYERS} are possible")
    return count


# --- folders with config.json -----------------------------------------------------------------------------------------------------

Windows = Callable[[Mapping[str, Any], int], tuple[int | None, ...]]


def _no_windows(values: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    return (None,) * num_layers


def _mistral_windows(values: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    return _windows_of_types(values, num_layers, 0)


def _qwen_windows(values: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    if not values.get("use_sliding_window", False):
        return (None,) * num_layers
    return _windows_of_types(values, num_layers, whole(values, "max_window_layers", 28))


def _windows_of_types(values: Mapping[str, Any], num_layers: int, first: int) -> tuple[int | None, ...]:
    """By layer_types where they are given, else the layers from `first` on."""
    if values.get("sliding_window") is None:
        return (None,) * num_layers
    window = whole(values, "sliding_window")
    if window < 1:
        raise WeightsError(f"the model's config has sliding_window = {window}; it must be at least 1")
    kinds = values.get("layer_types")
    if kinds is None:
        return tuple(window if index >= first else None for index in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise WeightsError("the model's config has layer_types that are not one of full_attention and sliding_attention for each layer")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


HF_FAMILIES: dict[str, tuple[Windows, bool, bool]] = {  # windows, has_qkv_bias, has_qk_norm
    "LlamaForCausalLM": (_no_windows, False, False),
    "MistralForCausalLM": (_mistral_windows, False, False),
    "Qwen2ForCausalLM": (_qwen_windows, True, False),
    "Qwen3ForCausalLM": (_qwen_windows, False, True),
    "MixtralForCausalLM": (_mistral_windows, False, False),
    "Qwen2MoeForCausalLM": (_qwen_windows, True, False),
    "Qwen3MoeForCausalLM": (_qwen_windows, False, True),
}
HF_EXPERTS = ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")


def _read_folder(path: Path) -> ModelConfig:
    values = read_json(path / "config.json")
    eos = read_json(path / "generation_config.json", default={}).get("eos_token_id")
    eos_ids = _ids(eos if eos is not None else values.get("eos_token_id"))
    if values.get("model_type") == BRAID:
        return _braid_config(values, eos_ids)
    architectures = values.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if architecture in HF_GEMMAS:
        return _gemma_config(values, GEMMAS[HF_GEMMAS[architecture]], eos_ids)
    if architecture not in HF_FAMILIES:
        raise WeightsError(
            f"the model's architecture is {architecture!r}; supported are {', '.join((*HF_FAMILIES, *HF_GEMMAS))} and {BRAID}"
        )
    config = _hf_config(values, HF_FAMILIES[architecture], eos_ids)
    return replace(config, experts=_hf_experts(values, architecture)) if architecture in HF_EXPERTS else config


def _hf_experts(values: Mapping[str, Any], architecture: str) -> Experts | None:
    """None where every layer has one block."""
    if values.get("qkv_bias") is False:
        raise WeightsError("the model's config has qkv_bias = false, which is not supported")
    num_layers = whole(values, "num_hidden_layers")
    count = whole(values, "num_local_experts" if "num_local_experts" in values else "num_experts")
    if architecture == "MixtralForCausalLM":
        return Experts(count, whole(values, "num_experts_per_tok"), whole(values, "intermediate_size"), True, (True,) * num_layers)
    every, dense = whole(values, "decoder_sparse_step", 1), values.get("mlp_only_layers") or []
    if every < 1 or not isinstance(dense, list) or any(not isinstance(each, int) for each in dense):
        raise WeightsError(f"the model's config has decoder_sparse_step = {every} and mlp_only_layers = {dense!r}, which say of no layer")
    if not count:
        return None
    experts = Experts(
        count=count,
        top_k=whole(values, "num_experts_per_tok"),
        width=whole(values, "moe_intermediate_size"),
        is_normalised=bool(values.get("norm_topk_prob", False)),
        is_sparse=tuple(index not in dense and (index + 1) % every == 0 for index in range(num_layers)),
        shared_width=whole(values, "shared_expert_intermediate_size") if architecture == "Qwen2MoeForCausalLM" else 0,
    )
    return experts if any(experts.is_sparse) else None


def _hf_config(values: Mapping[str, Any], family: tuple[Windows, bool, bool], eos_ids: tuple[int, ...]) -> ModelConfig:
    windows, has_qkv_bias, has_qk_norm = family
    _refuse_unbuilt(values)
    num_heads = whole(values, "num_attention_heads")
    width = whole(values, "hidden_size")
    # Qwen 3 alone has a head width of its own where the config leaves it out.
    usual_head_width = 128 if has_qk_norm else width // max(num_heads, 1)
    base, scaling = _hf_rope(values)
    num_layers = _num_layers(values, "num_hidden_layers")
    bos = _ids(values.get("bos_token_id"))
    return ModelConfig(
        vocab_size=whole(values, "vocab_size"),
        width=width,
        feed_forward_width=whole(values, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=whole(values, "num_key_value_heads", num_heads),
        head_width=whole(values, "head_dim", usual_head_width),
        layers=tuple(LayerAttention(window, rope_base=base, rope_scaling=scaling) for window in windows(values, num_layers)),
        max_context=whole(values, "max_position_embeddings"),
        norm_eps=real(values, "rms_norm_eps", 1e-6),
        activation=_ACTIVATIONS[values.get("hidden_act", "silu")],
        has_tied_head=bool(values.get("tie_word_embeddings", False)),
        has_qkv_bias=has_qkv_bias,
        has_qk_norm=has_qk_norm,
        eos_ids=eos_ids,
        bos_id=bos[0] if bos else None,
    )


def _refuse_unbuilt(values: Mapping[str, Any]) -> None:
    """What would change the arithmetic and is not built must stop the start, not be skipped."""
    if values.get("quantization_config"):
        method = values["quantization_config"]
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise WeightsError(f"the model's safetensors are quantised ({name}); supported are float32, float16 and bfloat16, and GGUF")
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            raise WeightsError(f"the model's config has {key} = true, which is not supported")
    if values.get("hidden_act", "silu") not in _ACTIVATIONS:
        raise WeightsError(f"the model's activation is {values['hidden_act']!r}; supported are {', '.join(_ACTIVATIONS)}")


def _hf_rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from rope_parameters (newer configs) or rope_theta and rope_scaling."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise WeightsError("the model's config has a rotary scaling that is not an object")
    if real(rope, "partial_rotary_factor", real(values, "partial_rotary_factor", 1.0)) != 1.0:
        raise WeightsError("the model rotates only a part of each head, which is not supported")
    base = real(rope, "rope_theta", real(values, "rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, RopeScaling("linear", real(rope, "factor"))
    if kind == "llama3":
        return base, RopeScaling(
            kind="llama3",
            factor=real(rope, "factor"),
            low_freq_factor=real(rope, "low_freq_factor"),
            high_freq_factor=real(rope, "high_freq_factor"),
            original_max_position=whole(rope, "original_max_position_embeddings"),
        )
    raise WeightsError(f"the model's rotary scaling is of kind {kind!r}; supported are linear and llama3")


# --- Gemma: norms on both sides, local layers, softcaps ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gemma:
    """What tells one generation from another. usual: what published configs leave out (source: the config classes of transformers).
    every: so manieth layer sees everything, the others have a window. local_base: rotary base of the latter, None: as of the others.
    width_scaled_layers: how many the one size has whose queries are scaled by its width, which no GGUF file says (source: llama.cpp)."""

    usual: Mapping[str, Any]
    has_qk_norm: bool = False
    has_post_norms: bool = True
    every: int = 1
    base: float = 10_000.0
    local_base: float | None = None
    width_scaled_layers: int = 0


_GEMMA_USUAL: dict[str, Any] = {
    "vocab_size": 256_000,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
}
_GEMMA_2_USUAL = _GEMMA_USUAL | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA_3_USUAL = _GEMMA_2_USUAL | {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
GEMMAS = {
    "gemma": Gemma(_GEMMA_USUAL, has_post_norms=False),
    "gemma2": Gemma(_GEMMA_2_USUAL, every=2, width_scaled_layers=46),
    "gemma3": Gemma(_GEMMA_3_USUAL, has_qk_norm=True, every=6, base=1_000_000.0, local_base=10_000.0, width_scaled_layers=62),
}
"""By the names that GGUF files give them."""
HF_GEMMAS = {
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
}


def _gemma_config(values: Mapping[str, Any], gemma: Gemma, eos_ids: tuple[int, ...]) -> ModelConfig:
    """Of a text model, or of the text model inside one that also reads pictures."""
    given = values.get("text_config", values)
    if not isinstance(given, dict):
        raise WeightsError("the model's config has a text_config that is not an object")
    text = dict(gemma.usual) | {key: value for key, value in given.items() if value is not None or key.endswith("_softcapping")}
    if text.get("use_bidirectional_attention"):
        raise WeightsError("the model's config has use_bidirectional_attention, which is not supported")
    text["hidden_act"] = text["hidden_activation"]
    whole_rope, local_rope = _gemma_rotary(text, gemma)
    plain = _hf_config(text | whole_rope, (_no_windows, False, gemma.has_qk_norm), eos_ids or _ids(text["eos_token_id"]))
    every = whole(text, "sliding_window_pattern", whole(text, "_sliding_window_pattern", gemma.every))
    text.setdefault("layer_types", _layer_types(len(plain.layers), every))
    windows = _windows_of_types(text, len(plain.layers), 0)
    base, scaling = _hf_rope(local_rope)
    softcap = _softcap(text, "attn_logit_softcapping")
    seeing_all = replace(plain.layers[0], softcap=softcap)
    local = LayerAttention(rope_base=base, rope_scaling=scaling, softcap=softcap)
    return replace(
        plain,
        layers=tuple(seeing_all if window is None else replace(local, window=window) for window in windows),
        scale=real(text, "query_pre_attn_scalar", plain.head_width) ** -0.5,
        has_post_norms=gemma.has_post_norms,
        embedding_scale=math.sqrt(plain.width),
        norm_offset=1.0,
        logit_softcap=_softcap(text, "final_logit_softcapping"),
    )


def _softcap(values: Mapping[str, Any], key: str) -> float:
    return real(values, key) if values.get(key) else 0.0


def _layer_types(num_layers: int, every: int) -> list[str]:
    if every < 1:
        raise WeightsError(f"the model's config has a pattern of {every} layers; it must be at least 1")
    return ["sliding_attention" if (index + 1) % every else "full_attention" for index in range(num_layers)]


def _gemma_rotary(text: Mapping[str, Any], gemma: Gemma) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the layers that see everything, and the local ones, turn by, each as `_hf_rope` reads it: newer configs name both in
    rope_parameters, older ones have the local base beside the other."""
    both, scaling = text.get("rope_parameters") or {}, text.get("rope_scaling") or {}
    if gemma.local_base is None:
        rope = {"rope_parameters": both or scaling, "rope_theta": real(text, "rope_theta", gemma.base)}
        return rope, rope
    kinds = both if isinstance(both, dict) else {"full_attention": both}
    whole_kind, local_kind = (kinds.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    if not (isinstance(whole_kind, dict) and isinstance(local_kind, dict) and isinstance(scaling, dict)):
        raise WeightsError("the model's config has rotary parameters that are not an object for each kind of layer")
    bases = (real(text, "rope_theta", gemma.base), real(text, "rope_local_base_freq", gemma.local_base))
    return {"rope_parameters": scaling | whole_kind, "rope_theta": bases[0]}, {"rope_parameters": local_kind, "rope_theta": bases[1]}


# --- Braid's own family: text and pictures in one stream, local and global layers ------------------------------------------------

BRAID = "braid"
_MOST_RADIUS = 2**15
_LAYER_TYPES = ("local_attention", "full_attention")


def braid_config(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of a model of this family; `read_config` reads it back. Raises: ValueError for a model that is not of it."""
    plain = LayerAttention(rope_base=config.layers[0].rope_base)
    local = next((layer for layer in config.layers if layer != plain), None)
    values = {
        "model_type": BRAID,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward_width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": next((name for name, ours in _ACTIVATIONS.items() if ours == config.activation), None),
        "use_qk_norm": config.has_qk_norm,
        "tie_word_embeddings": config.has_tied_head,
        "max_position_embeddings": config.max_context,
        "rope_theta": plain.rope_base,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "layer_types": [_LAYER_TYPES[layer == plain] for layer in config.layers],
        "sliding_window": local.window if local else None,
        "attention_sink": local.sink if local else 0,
        "neighbourhood_radius": list(local.radius) if local and local.radius else None,
        "image": asdict(config.pictures) if config.pictures else None,
    }
    if _braid_config(values, config.eos_ids) != config:
        raise ValueError("this model has parts that the family has no words for")
    return values


def _braid_config(values: Mapping[str, Any], eos_ids: tuple[int, ...]) -> ModelConfig:
    whole(values, "head_dim")  # nothing is usual here
    plain = _hf_config(values, (_no_windows, False, bool(values.get("use_qk_norm", True))), eos_ids)
    pictures = _pictures(values.get("image"), plain)
    kinds = values.get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != len(plain.layers) or any(kind not in _LAYER_TYPES for kind in kinds):
        raise WeightsError(f"the model's config has layer_types that are not one of {' and '.join(_LAYER_TYPES)} for each layer")
    local = _local_attention(values, plain.layers[0], has_pictures=pictures is not None)
    layers = tuple(local if kind == "local_attention" else layer for kind, layer in zip(kinds, plain.layers, strict=True))
    return replace(plain, layers=layers, pictures=pictures)


def _local_attention(values: Mapping[str, Any], plain: LayerAttention, *, has_pictures: bool) -> LayerAttention:
    window = None if values.get("sliding_window") is None else whole(values, "sliding_window")
    sink, radius = whole(values, "attention_sink", 0), values.get("neighbourhood_radius")
    if not (window is None or 0 < window < 2**31) or not 0 <= sink < 2**31:
        raise WeightsError(f"the model's config has sliding_window = {window} and attention_sink = {sink}, which no layer can have")
    if radius is None:
        return replace(plain, window=window, sink=sink)
    if not isinstance(radius, list) or len(radius) != 2 or any(type(each) is not int or not 0 <= each < _MOST_RADIUS for each in radius):
        raise WeightsError(f"the model's config has neighbourhood_radius = {radius!r}; it must be two whole numbers, of rows and columns")
    if not has_pictures:
        raise WeightsError("the model's config has a neighbourhood_radius and no image")
    return replace(plain, window=window, sink=sink, radius=(radius[0], radius[1]))


def _pictures(image: object, config: ModelConfig) -> PictureIds | None:
    """The ids and the grid of its pictures; None for a model of text alone."""
    if image is None:
        return None
    if not isinstance(image, dict):
        raise WeightsError("the model's config has an image that is not an object")
    ids = PictureIds(**{field.name: whole(image, field.name) for field in fields(PictureIds)})
    if ids.rows < 1 or ids.columns < 1 or ids.num_places > config.max_context:
        raise WeightsError(f"a picture of {ids.rows} x {ids.columns} codes does not fit into a context of {config.max_context}")
    if ids.num_codes < 1 or ids.first_code < 0 or ids.first_code + ids.num_codes > config.vocab_size:
        raise WeightsError(f"image codes {ids.first_code} ... lie outside the vocabulary of {config.vocab_size}")
    marks = {ids.begin_id, ids.frame_id, ids.end_id}
    if len(marks) < 3 or any(ids.is_code(each) or not 0 <= each < config.vocab_size for each in marks):
        raise WeightsError("begin_id, frame_id and end_id of the model's image must be three ids of the vocabulary that are no codes")
    return ids


# --- GGUF files -------------------------------------------------------------------------------------------------------------------


def read_gguf_config(gguf: GGUFFile) -> ModelConfig:
    """The config that a GGUF file's metadata, and the presence of optional tensors, tell.

    Raises: WeightsError as `read_config` does.
    """
    family = gguf.metadata.get("general.architecture")
    if family not in GGUF_FAMILIES:
        raise WeightsError(f"the model's architecture is {family!r}; supported in GGUF files are {', '.join(GGUF_FAMILIES)}")
    if gguf.metadata.get("split.count", 1) not in (0, 1):
        raise WeightsError("the file is one part of a split model; put the parts together with llama-gguf-split --merge")
    values = {key.removeprefix(f"{family}."): value for key, value in gguf.metadata.items() if key.startswith(f"{family}.")}
    gemma = GEMMAS.get(family)
    for key in _GGUF_UNBUILT if gemma else (*_GGUF_UNBUILT, *_GGUF_SOFTCAPS):
        if values.get(key):
            raise WeightsError(f"the model's config has {key} = {values[key]!r}, which is not supported")
    num_heads, width = whole(values, "attention.head_count"), whole(values, "embedding_length")
    head_width = whole(values, "attention.key_length", width // max(num_heads, 1))
    value_width, rotated = whole(values, "attention.value_length", head_width), whole(values, "rope.dimension_count", head_width)
    if not head_width == value_width == rotated:
        raise WeightsError(f"keys are {head_width} wide, values {value_width}, and {rotated} dimensions are rotated; they must be equal")
    base = real(values, "rope.freq_base", 10_000.0)
    window = whole(values, "attention.sliding_window", 0) or None
    attention = LayerAttention(window, rope_base=base, rope_scaling=_gguf_scaling(gguf, values, head_width, base))
    bos = _ids(gguf.metadata.get("tokenizer.ggml.bos_token_id"))
    eos = [gguf.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    table = gguf.tensors.get(GGUF_NAMES["embedding"])
    config = ModelConfig(
        vocab_size=whole(values, "vocab_size", table.shape[0] if table else None),
        width=width,
        feed_forward_width=whole(values, "feed_forward_length", values.get("expert_feed_forward_length")),
        num_heads=num_heads,
        num_kv_heads=whole(values, "attention.head_count_kv", num_heads),
        head_width=head_width,
        layers=(attention,) * _num_layers(values, "block_count"),
        max_context=whole(values, "context_length"),
        norm_eps=real(values, "attention.layer_norm_rms_epsilon"),
        has_tied_head=GGUF_NAMES["head"] not in gguf.tensors,
        has_qkv_bias="blk.0.attn_q.bias" in gguf.tensors,
        has_qk_norm="blk.0.attn_q_norm.weight" in gguf.tensors,
        scale=real(values, "attention.scale") if values.get("attention.scale") else None,
        eos_ids=_ids([each for each in eos if each is not None]),
        bos_id=bos[0] if bos else None,
        experts=_gguf_experts(gguf, values, family),
    )
    return config if gemma is None else _gguf_gemma(values, gemma, config)


def _gguf_experts(gguf: GGUFFile, values: Mapping[str, Any], family: str) -> Experts | None:
    """None of a model without any."""
    if not values.get("expert_count"):
        return None
    is_softmax = values.get("expert_gating_func", 1) == 1
    if family not in GGUF_EXPERTS or not is_softmax or values.get("expert_weights_scale", 1.0) not in (0.0, 1.0):
        raise WeightsError(
            f"the experts of this {family} model are chosen in a way that is not built; {', '.join(GGUF_EXPERTS)} are, by softmax"
        )
    num_layers = _num_layers(values, "block_count")
    return Experts(
        count=whole(values, "expert_count"),
        top_k=whole(values, "expert_used_count"),
        width=whole(values, "expert_feed_forward_length", values.get("feed_forward_length")),
        is_normalised=GGUF_EXPERTS[family],
        is_sparse=tuple(GGUF_NAMES["layers.{}.router"].format(index) in gguf.tensors for index in range(num_layers)),
        shared_width=whole(values, "expert_shared_feed_forward_length", 0),
    )


def _gguf_gemma(values: Mapping[str, Any], gemma: Gemma, plain: ModelConfig) -> ModelConfig:
    """What a file of this family says besides, and what it leaves to its readers. Its norm weights are whole."""
    window, softcap = gemma.usual.get("sliding_window"), _softcap({**gemma.usual, **values}, "attn_logit_softcapping")
    attention = replace(plain.layers[0], window=None, softcap=softcap)
    local = replace(attention, window=plain.layers[0].window or window)
    if gemma.local_base is not None:  # where the layers that see everything are scaled, these are not
        local = replace(local, rope_base=real(values, "rope.freq_base_swa", gemma.local_base), rope_scaling=None)
    key = "attention.sliding_window_pattern"
    pattern = values.get(key, gemma.every)
    if not isinstance(pattern, list):
        pattern = [kind == "sliding_attention" for kind in _layer_types(len(plain.layers), whole({key: pattern}, key))]
    if len(pattern) != len(plain.layers):
        raise WeightsError(f"the model's config has {key} for {len(pattern)} of its {len(plain.layers)} layers")
    scale = math.sqrt(plain.num_heads / plain.width) if len(plain.layers) == gemma.width_scaled_layers else plain.scale
    return replace(
        plain,
        layers=tuple(local if is_local else attention for is_local in pattern),
        activation="gelu_tanh",
        scale=scale,
        has_post_norms=gemma.has_post_norms,
        embedding_scale=math.sqrt(plain.width),
        logit_softcap=_softcap({**gemma.usual, **values}, "final_logit_softcapping"),
    )


def _gguf_scaling(gguf: GGUFFile, values: Mapping[str, Any], head_width: int, base: float) -> RopeScaling | None:
    if factors := gguf.tensors.get(GGUF_ROPE_FACTORS):
        return _llama3_of_factors(factors, head_width, base)
    kind = values.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", real(values, "rope.scaling.factor"))
    raise WeightsError(f"the model's rotary scaling is of kind {kind!r}; supported are linear and the Llama 3 factors")


def _llama3_of_factors(factors: GGUFTensor, head_width: int, base: float) -> RopeScaling:
    """GGUF stores what the Llama 3 schedule gives, one divisor for each pair of dimensions, and not its parameters. Every release
    has used the same bands with a factor of 8 or 32, so the schedule is found by trying, and believed only when it fits.
    """
    data = np.asarray(factors.data).reshape(-1)
    if factors.type.name != "F32" or data.size != head_width // 2 or not np.isfinite(data).all() or data.min() < 1:
        raise WeightsError(f"{GGUF_ROPE_FACTORS} must hold {head_width // 2} float32 numbers of at least 1")
    frequencies = base ** (-np.arange(0, head_width, 2) / head_width)
    for factor in (float(data.max()), 8.0, 32.0):
        scaling = RopeScaling("llama3", factor)
        turns = scaling.original_max_position * frequencies / (2 * math.pi)
        smooth = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clip(0, 1)
        # float32 in the file; 1e-3 is far below the differences between schedules (a factor of 8 against 32).
        if np.allclose(data, 1 / (smooth + (1 - smooth) / factor), rtol=1e-3):
            return scaling
    raise WeightsError(f"{GGUF_ROPE_FACTORS} holds rotary factors of another schedule than Llama 3's, which is not supported")

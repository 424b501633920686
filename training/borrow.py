"""A decoder that begins as somebody else's: the weights and the vocabulary of a text checkpoint, with rows for codes put behind.

The checkpoint's first ids must be special tokens; they become ours, whose ids are the same in every model (training/tokens.py). So what
they meant, a checkpoint's own chat template above all, is given up. Called by the stages.
Shape suffixes: V vocabulary, D width, K codes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders
from torch import Tensor

from service.checkpoint import find_checkpoint, open_gguf, read_json
from service.codec.tokenizer_files import tokenizer_from_gguf
from service.errors import StartupError
from service.model.config import LayerAttention, ModelConfig, expected_shapes
from service.model.families import read_config
from service.model.weights import open_weights
from training.decoder import NamedSource
from training.tokens import SPECIALS

_SIZES = ("width", "feed_forward_width", "num_heads", "num_kv_heads", "head_width", "norm_eps", "has_qk_norm")
"""What a recipe can say, under these names, and must say as the checkpoint has it."""
_FIXED = ("has_tied_head", "has_qkv_bias", "has_post_norms", "embedding_scale", "activation", "scale", "experts")
"""What all recipes' decoders have alike."""


def borrowed_vocabulary(checkpoint: Path) -> tokenizers.Tokenizer:
    """The text's vocabulary, its first ids under the names of our special tokens. checkpoint: a GGUF file, or a folder.

    Raises: StartupError for a vocabulary that is not byte-level BPE, or whose first ids are no special tokens.
    """
    found = find_checkpoint(checkpoint)
    if found.kind == "gguf":
        borrowed = tokenizer_from_gguf(open_gguf(found.path, with_tokens=True).metadata)
        special, library = {token.id: token.text for token in borrowed.special.by_text.values()}, borrowed.first
        data: dict[str, Any] = json.loads(library.to_str())
    else:
        data = read_json(found.path / "tokenizer.json")
        special = {token["id"]: token["content"] for token in data.get("added_tokens", []) if token.get("special")}
    if data["model"].get("type") != "BPE" or "ByteLevel" not in json.dumps(data["pre_tokenizer"]):
        raise StartupError(f"the vocabulary of {checkpoint.name} is not byte-level BPE, which alone can be borrowed")
    if missing := [index for index in range(len(SPECIALS)) if index not in special]:
        raise StartupError(f"ids {missing} of {checkpoint.name} are no special tokens; the first {len(SPECIALS)} must be, to become ours")
    names = special | dict(enumerate(SPECIALS))
    vocab = {text: index for text, index in data["model"]["vocab"].items() if index not in names}
    data["model"]["vocab"] = vocab | {name: index for index, name in names.items()}
    data["model"]["unk_token"] = None  # bytes spell everything
    data["added_tokens"], data["post_processor"] = [], None
    vocabulary = tokenizers.Tokenizer.from_str(json.dumps(data))
    vocabulary.add_special_tokens([names[index] for index in sorted(names)])
    vocabulary.decoder = decoders.ByteLevel()
    return vocabulary


def borrowed_weights(checkpoint: Path, config: ModelConfig, codes_KD: Tensor) -> NamedSource:
    """The checkpoint's tensors as those of a decoder of ours. codes: directions in which the codes' rows lie; they get the length that the
    text's have. A code's place says nothing at first.

    Raises: StartupError as `check_borrowed` does; WeightsError.
    """
    check_borrowed(checkpoint, config)
    theirs = read_config(checkpoint)
    source = open_weights(checkpoint, theirs)
    tensors = {name: source.get(name).float() for name in expected_shapes(theirs)}
    text_VD = tensors["embedding"]
    rows_KD = codes_KD * (text_VD.norm(dim=-1).mean() / codes_KD.norm(dim=-1).mean())
    tensors["embedding"] = torch.cat([text_VD, rows_KD])
    empty = {name: torch.zeros(shape) for name, shape in expected_shapes(config).items() if name not in tensors}
    return NamedSource(tensors | empty)


def check_borrowed(checkpoint: Path, config: ModelConfig) -> None:
    """Raises: StartupError naming every size that the recipe must have as the checkpoint has it, or what no recipe can have."""
    theirs, name = read_config(checkpoint), checkpoint.name
    if strange := [key for key in _FIXED if getattr(theirs, key) != getattr(config, key)]:
        raise StartupError(f"{name} can't be borrowed: its {', '.join(f'{key} is {getattr(theirs, key)!r}' for key in strange)}")
    rope = theirs.layers[0]
    if any(layer != LayerAttention(rope_base=rope.rope_base) for layer in theirs.layers):
        raise StartupError(f"{name} can't be borrowed: it has windows, or a scaled rotary embedding")
    wanted = {key: getattr(theirs, key) for key in _SIZES} | {"num_layers": len(theirs.layers), "rope_base": rope.rope_base}
    wanted["text_vocab_size"] = theirs.vocab_size
    own = {key: getattr(config, key) for key in _SIZES} | {"num_layers": len(config.layers), "rope_base": config.layers[0].rope_base}
    own["text_vocab_size"] = config.vocab_size - (config.pictures.num_codes if config.pictures else 0)
    if differing := [key for key, value in wanted.items() if not math.isclose(value, own[key], rel_tol=1e-6)]:  # a GGUF file has float32
        raise StartupError(f"{', '.join(f'decoder.{key} must be {wanted[key]:g}' for key in differing)}, as {name} has it")
    if (size := borrowed_vocabulary(checkpoint).get_vocab_size()) != theirs.vocab_size:
        raise StartupError(f"{name} can't be borrowed: its vocabulary has {size} tokens, its embedding {theirs.vocab_size} rows")

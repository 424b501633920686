"""A decoder that begins as somebody else's: the weights and the vocabulary of a text checkpoint, with rows for codes put behind.

The checkpoint's first ids must be special tokens; they become ours, whose ids are the same in every model (training/tokens.py). So what
they meant, a checkpoint's own chat template above all, is given up. Called by the stages.
Shape suffixes: V vocabulary, D width, K codes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders
from torch import Tensor

from service.checkpoint import find_checkpoint, open_gguf, read_json
from service.codec.tokenizer_files import tokenizer_from_gguf
from service.errors import StartupError
from service.model.config import ModelConfig, expected_shapes
from service.model.families import read_config
from service.model.weights import open_weights
from training.decoder import NamedSource
from training.tokens import SPECIALS

_OWN = ("vocab_size", "layers", "max_context", "eos_ids", "bos_id", "pictures")
"""What a recipe decides, whatever the checkpoint says."""


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

    Raises: StartupError naming what the recipe's decoder has that the checkpoint has not; WeightsError.
    """
    theirs = read_config(checkpoint)
    _check_same(config, theirs, checkpoint.name)
    source = open_weights(checkpoint, theirs)
    tensors = {name: source.get(name).float() for name in expected_shapes(theirs)}
    text_VD = tensors["embedding"]
    rows_KD = codes_KD * (text_VD.norm(dim=-1).mean() / codes_KD.norm(dim=-1).mean())
    tensors["embedding"] = torch.cat([text_VD, rows_KD])
    if not config.has_tied_head:
        tensors["head"] = torch.cat([tensors["head"], rows_KD])
    empty = {name: torch.zeros(shape) for name, shape in expected_shapes(config).items() if name not in tensors}
    return NamedSource(tensors | empty)


def _check_same(config: ModelConfig, theirs: ModelConfig, name: str) -> None:
    wanted = theirs.vocab_size + (config.pictures.num_codes if config.pictures else 0)
    if config.vocab_size != wanted:
        raise StartupError(f"decoder.text_vocab_size must be {theirs.vocab_size}, as {name} has it")
    if len(config.layers) != len(theirs.layers):
        raise StartupError(f"decoder.num_layers must be {len(theirs.layers)}, as {name} has it")
    if any(replace(layer, window=None, sink=0, radius=None) != other for layer, other in zip(config.layers, theirs.layers, strict=True)):
        raise StartupError(f"decoder.rope_base must be {theirs.layers[0].rope_base:g} and nothing else may differ, as {name} has it")
    differing: Sequence[str] = [
        f"decoder.{field.name} must be {getattr(theirs, field.name)}"
        for field in fields(ModelConfig)
        if field.name not in _OWN and getattr(config, field.name) != getattr(theirs, field.name)
    ]
    if differing:
        raise StartupError(f"{', '.join(differing)}, as {name} has it")

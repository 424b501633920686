"""A small encoder of BERT's class with random weights, as a folder in the form of sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = ("hello", "world", "play", "##ing", "##s", "the", "cat", "a", "##b", ",", ".", "[", "]", "sep", "cls", "un")


def word_piece_library() -> tokenizers.Tokenizer:
    """tokenizer.json of BERT's kind, with the truncation and padding that published files carry."""
    vocab = {text: index for index, text in enumerate((*SPECIAL, *WORDS))}
    library = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.add_special_tokens(list(SPECIAL))
    ends = [(text, vocab[text]) for text in ("[CLS]", "[SEP]")]
    library.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    library.enable_truncation(8)
    library.enable_padding(length=8)
    return library


def bert(seed: int = 0, **changes: Any) -> BertModel:
    """float32, with biases and norms that are no zeros and ones."""
    numbers = {"vocab_size": 21, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    config = BertConfig(**{**numbers, "max_position_embeddings": 300, "layer_norm_eps": 1e-12, **changes})
    torch.manual_seed(seed)
    model = BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    return model


def write_encoder(folder: Path, model: BertModel, **files: dict[str, Any] | None) -> Path:
    """files: more JSON files by name without the ending; None takes a file away."""
    model.save_pretrained(folder)
    word_piece_library().save(str(folder / "tokenizer.json"))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    usual: dict[str, dict[str, Any] | None] = {
        "sentence_bert_config": {"max_seq_length": 256, "do_lower_case": False},
        "tokenizer_config": {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"},
        "1_Pooling/config": {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False},
    }
    for name, data in {**usual, **files}.items():
        path = folder / f"{name}.json"
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_text(json.dumps(data), encoding="utf-8")
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    """Other values in config.json; None takes a key away."""
    path = folder / "config.json"
    data = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}), encoding="utf-8")

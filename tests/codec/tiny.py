"""Small checkpoints made on the spot: vocabularies of both kinds as GGUF, and a folder with tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from service.codec.special import SpecialTokens
from service.codec.tokenizer import Ends, Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("Ġ", "w"))
S = "\u2581"
SPM_TEXTS = ("\u2581", "h", "e", "l", "o", "he", "ll", "hell", "hello", "\u2581hello", "\u2581he", "\u2581h")


def letters() -> list[str]:
    """The letter of each byte, in the library's own words."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    moved = iter(sorted(char for char in alphabet if ord(char) >= 0x100))
    return [chr(byte) if chr(byte) in alphabet else next(moved) for byte in range(256)]


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    """Keys of a GGUF file whose vocabulary is three control tokens, one of its own, the 256 bytes and six merges."""
    tokens = [*CONTROL, "<own>", *letters(), *("".join(merge) for merge in MERGES)]
    return {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [4] + [1] * (len(tokens) - len(CONTROL) - 1),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in MERGES],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHATML,
        **changes,
    }


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """Keys of a GGUF file with SentencePiece's scores, a byte token for every byte, and a few merged pieces."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPM_TEXTS]
    return {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(rank) for rank in range(len(SPM_TEXTS))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(SPM_TEXTS),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **changes,
    }


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]] | None = None) -> Path:
    """A GGUF file; None leaves a key out."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key == "general.architecture" or value is None:
            continue
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_folder(folder: Path, library: tokenizers.Tokenizer, **files: dict[str, Any]) -> Path:
    """A folder with tokenizer.json and the named JSON files; config has what a codec needs, model.safetensors is empty."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").touch()
    library.save(str(folder / "tokenizer.json"))
    for name, data in {"config": {"max_position_embeddings": 512}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def llama3_library() -> tokenizers.Tokenizer:
    """tokenizer.json of the Llama 3 kind: byte-level, a beginning of sequence added by the post-processor, whole words looked up."""
    vocab = {text: index for index, text in enumerate([*letters(), *("".join(merge) for merge in MERGES)])}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES), ignore_merges=True))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|begin|>", "<|eot|>", "<|strip|>"])
    library.add_special_tokens([AddedToken("<|right|>", rstrip=True, special=True)])
    library.add_tokens(["<think>"])
    begin = library.token_to_id("<|begin|>")
    library.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])
    return library


def llama2_library(prepend_scheme: str) -> tokenizers.Tokenizer:
    """tokenizer.json of the Llama 2 kind, whose spaces are written as a letter of their own."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *SPM_TEXTS]
    vocab = {text: index for index, text in enumerate(texts)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), (S, "hello"), (S, "he"), (S + "h", "e"), (S, "h")]
    library = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prepend_scheme == "legacy":
        library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return library


def tokenizer_of(pieces: list[bytes]) -> Tokenizer:
    """A tokenizer that can only decode, with these bytes as its ids."""
    library = tokenizers.Tokenizer(models.BPE())
    return Tokenizer(pieces, SpecialTokens([]), Ends(), library, library)

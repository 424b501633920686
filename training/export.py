"""Artefacts: what a stage leaves for the next one and for servers, as files that other libraries read too; and how they are published.

All weights are bfloat16, in files under 15 MB. A later stage starts from the rounded weights, so what is measured is what ships.
Trains nothing. Called by the stages and by the command.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from service.errors import StartupError
from service.model.families import HF_NAMES, braid_config, read_config
from service.model.transformer import Transformer
from service.model.vq import VQTokenizer
from service.model.vq_files import CONFIG, FOLDER, read_image_tokenizer, vq_config_values
from service.model.weights import open_weights
from training.decoder import named_tensors, teachable
from training.tokens import BOS_ID, EOS_ID, PAD_ID, export_tokenizer

MOST_BYTES = 14_500_000
"""Of the tensors in one file; with its header it stays under SHIPPED_BYTES."""
SHIPPED_BYTES = 15_000_000
"""Of a file in this repository."""
GENERATION = {"do_sample": True, "temperature": 0.9, "min_p": 0.1, "guidance_scale": 1.0}


@contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """A folder to be filled that takes its place when everything in it is written; never half of it.

    Mutates: the place, whose old contents are replaced.
    """
    scratch = place.with_name(f".{place.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    shutil.rmtree(place, ignore_errors=True)
    scratch.replace(place)


def save_image_tokenizer(model: VQTokenizer, folder: Path) -> None:
    """Writes config.json and model.safetensors. Mutates: the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, vq_config_values(model.config))
    _save_tensors(model.state_dict(), folder)


def save_decoder(model: Transformer, tokenizer: tokenizers.Tokenizer, image_tokenizer: Path, folder: Path) -> None:
    """Writes a checkpoint that can be served. tokenizer: of the text alone; image_tokenizer: the folder of one, copied.

    Mutates: the folder.
    """
    config = model.config
    if config.pictures is None:
        raise ValueError("a decoder without pictures is not of this family")
    write_json(folder / "config.json", {**braid_config(config), "torch_dtype": "bfloat16"})
    write_json(folder / "generation_config.json", {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, **GENERATION})
    export_tokenizer(tokenizer, folder, config.pictures.num_codes, config.max_context)
    shutil.copytree(image_tokenizer, folder / FOLDER)
    _save_tensors({hf_name(name): tensor for name, tensor in named_tensors(model).items()}, folder)


def load_decoder(folder: Path, device: torch.device | str = "cpu") -> Transformer:
    """The decoder of an artefact, to be taught further. Raises: WeightsError."""
    config = read_config(folder)
    return teachable(config, open_weights(folder, config), device)


def load_image_tokenizer(artefact: Path, device: torch.device | str = "cpu") -> VQTokenizer:
    """The image tokenizer inside any artefact. Raises: WeightsError."""
    return read_image_tokenizer(artefact / FOLDER, device)


def hf_name(name: str) -> str:
    """The name in the file of a tensor by our name: layers.3.q is model.layers.3.self_attn.q_proj.weight."""
    if not name.startswith("layers."):
        return HF_NAMES[name]
    _, index, rest = name.split(".", 2)
    return HF_NAMES[f"layers.{{}}.{rest}"].format(index)


def publish(artefact: Path, target: Path, most_bytes: int | None = SHIPPED_BYTES) -> list[Path]:
    """Copies an artefact to where it is shipped from, beside what else lies there (a model card). Returns the files written.

    most_bytes: of a file. Mutates: the target's weights and configs. Raises: StartupError when a file is too large.
    """
    files = [path for path in sorted(artefact.rglob("*")) if path.is_file()]
    if most_bytes and (large := [path.name for path in files if path.stat().st_size >= most_bytes]):
        raise StartupError(
            f"{', '.join(large)} of the artefact is {most_bytes // 10**6} MB or more, too large for this repository; choose another folder"
        )
    for old in [*target.rglob("*.safetensors"), *target.rglob("*.safetensors.index.json")]:
        old.unlink()
    written = [target / path.relative_to(artefact) for path in files]
    for source, copy in zip(files, written, strict=True):
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    return written


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _save_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """model.safetensors, or numbered shards with an index."""
    rounded = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_torch_state_dict(rounded, folder, max_shard_size=MOST_BYTES, metadata={"format": "pt"})

"""A fine-tuned model as files: the decoder in the kind of file it came in, so that it can be served, and its head with the classes.

What was not learned (tokenizer, template, generation settings) is copied from the checkpoint. Called by the command.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import gguf
import msgspec
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.quants import quantize
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from service.checkpoint import find_checkpoint, open_gguf
from service.errors import StartupError
from service.model.config import ModelConfig
from service.model.families import GGUF_INTERLEAVED, GGUF_NAMES
from service.model.vq_files import FOLDER
from training.decoder import named_tensors
from training.export import MOST_BYTES, hf_name
from training.finetune.learner import Adaptation, Learner
from training.finetune.tasks import Kind, Task

HEAD, LABELS, TASK = "head.safetensors", "labels.json", "task.json"
_DESCRIPTIONS = (".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True, slots=True)
class TaskCard:
    """What has to be known to ask an exported model again."""

    kind: Kind
    is_causal: bool
    max_len: int


def export(learner: Learner, task: Task, max_len: int, folder: Path) -> None:
    """Writes the decoder, and for a task with classes the head. The learner must be settled. Mutates: the folder, made anew.

    The head's file stands in a folder of its own, because a loader takes every .safetensors beside a config for the decoder's.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkpoint = find_checkpoint(learner.path)
    if checkpoint.kind == "gguf":
        _save_gguf(learner, checkpoint.path, folder / "model.gguf")
    else:
        _save_folder(learner, checkpoint.path, folder)
    own = folder / "task"
    own.mkdir()
    card = TaskCard(task.kind, learner.adaptation.is_causal, max_len)
    (own / TASK).write_text(json.dumps(asdict(card), indent=2) + "\n", encoding="utf-8")
    if task.classes is not None and learner.head is not None:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in learner.head.state_dict().items()}, own / HEAD)
        (own / LABELS).write_text(json.dumps(list(task.classes), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def load_exported(folder: Path, device: str = "cpu") -> tuple[Learner, TaskCard, tuple[str, ...] | None]:
    """The model as it was exported, ready to answer. Raises: StartupError for a folder that is no such export; WeightsError."""
    own = folder / "task"
    try:
        card = msgspec.json.decode((own / TASK).read_bytes(), type=TaskCard)
        classes = tuple(msgspec.json.decode((own / LABELS).read_bytes(), type=list[str])) if (own / LABELS).exists() else None
        tensors = load_file(own / HEAD) if classes is not None else {}
    except (OSError, msgspec.DecodeError) as error:
        raise StartupError(f"{folder.name} is no export of fine-tuning: {error}") from error
    adaptation = Adaptation(rank=0, is_causal=card.is_causal)
    learner = Learner(folder, adaptation, None if classes is None else len(classes), seed=0, device=device)
    if learner.head is not None:
        learner.head.load_state_dict(tensors)
    return learner, card, classes


def _save_folder(learner: Learner, source: Path, folder: Path) -> None:
    """safetensors in bfloat16; everything else that describes the model as it is."""
    for path in source.iterdir():
        if path.name == FOLDER:
            shutil.copytree(path, folder / path.name)
        elif path.suffix in _DESCRIPTIONS and not path.name.endswith(".safetensors.index.json"):
            shutil.copyfile(path, folder / path.name)
    tensors = {hf_name(name): _rounded(tensor) for name, tensor in named_tensors(learner.model).items()}
    save_torch_state_dict(tensors, folder, max_shard_size=MOST_BYTES, metadata={"format": "pt"})


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", torch.bfloat16).contiguous()


def _save_gguf(learner: Learner, source: Path, path: Path) -> None:
    """The source's own metadata, all of it, around new tensors: matrices in bfloat16, vectors in float32."""
    reader: Any = GGUFReader(source)
    family = str(open_gguf(source, with_tokens=False).metadata["general.architecture"])
    writer: Any = gguf.GGUFWriter(path, family)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        writer.add_key_value(field.name, field.contents(), kind, sub_type=field.types[-1] if kind == GGUFValueType.ARRAY else None)
    writer.add_uint32("general.file_type", int(gguf.LlamaFileType.MOSTLY_BF16))
    for name, values in _gguf_arrays(named_tensors(learner.model), learner.model.config, family).items():
        kind = GGMLQuantizationType.BF16 if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_arrays(tensors: Mapping[str, Tensor], config: ModelConfig, family: str) -> dict[str, np.ndarray[Any, Any]]:
    """float32 by the file's names, in the file's order of rows."""
    found = {}
    for name, tensor in tensors.items():
        _, _, part = name.rpartition(".")
        if family in GGUF_INTERLEAVED and part in ("q", "k", "q_bias", "k_bias"):
            tensor = interleaved_rows(tensor, config.num_heads if part.startswith("q") else config.num_kv_heads)
        index = name.split(".")[1] if name.startswith("layers.") else ""
        key = GGUF_NAMES[f"layers.{{}}.{part}"].format(index) if index else GGUF_NAMES[name]
        found[key] = cast(np.ndarray[Any, Any], tensor.float().cpu().numpy())
    return found


def interleaved_rows(rows: Tensor, num_heads: int) -> Tensor:
    """The inverse of `service.model.weights.half_split_rows`: rows [N * H, ...] as the file keeps them."""
    return rows.reshape(num_heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

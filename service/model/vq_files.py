"""An image tokenizer's folder: config.json and model.safetensors, read defensively.

Writes nothing. Called by whoever needs codes of pictures or pictures of codes: the runner, and training's later stages.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from service.checkpoint import read_json
from service.errors import WeightsError
from service.model.vq import VQConfig, VQTokenizer

FOLDER = "image_tokenizer"
"""Inside a checkpoint's folder."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"

_KIND = "vqgan"
_MOST = {"num_codes": 2**20, "code_width": 4096, "latent_channels": 8192, "num_res_blocks": 64, "encoder_kernel": 15}
_MOST_LEVELS, _MOST_CHANNELS = 10, 8192


def vq_config_values(config: VQConfig) -> dict[str, Any]:
    """What config.json says of it; `read_vq_config` is the way back."""
    return {"model_type": _KIND, **asdict(config)}


def read_vq_config(path: Path) -> VQConfig:
    """Of a config.json. Raises: WeightsError naming what is missing, unknown, or can't be."""
    values = read_json(path)
    kind = values.pop("model_type", None)
    if kind != _KIND:
        raise WeightsError(f"the image tokenizer is of the type {kind!r}; {_KIND!r} is built here")
    names = {each.name for each in fields(VQConfig)}
    if set(values) != names:
        raise WeightsError(f"the image tokenizer's config has {', '.join(sorted(set(values) ^ names))} too many or not at all")
    try:
        config = msgspec.convert(values, VQConfig)
    except msgspec.ValidationError as error:
        raise WeightsError(f"the image tokenizer's config: {error}") from error
    for name, most in _MOST.items():
        if not 0 < getattr(config, name) <= most:
            raise WeightsError(f"the image tokenizer's config has {name} = {getattr(config, name)}; between 1 and {most} are possible")
    if not 0 < len(config.channels) <= _MOST_LEVELS or not all(0 < each <= _MOST_CHANNELS for each in config.channels):
        raise WeightsError(f"the image tokenizer's config has channels = {list(config.channels)}")
    if not config.encoder_kernel % 2:
        raise WeightsError(f"the image tokenizer's config has encoder_kernel = {config.encoder_kernel}; it must be odd")
    return config


def read_image_tokenizer(folder: Path, device: torch.device | str = "cpu") -> VQTokenizer:
    """The tokenizer of a folder in float32, in evaluation mode, its convolutions in the memory order that they are fastest in.

    Raises: WeightsError when a file is missing or damaged, or a tensor is missing, unknown or misshapen.
    """
    config = read_vq_config(folder / CONFIG)
    with torch.device("meta"):  # shapes only: nothing is allocated before the file is known to fit them
        model = VQTokenizer(config)
    try:
        tensors = load_file(folder / WEIGHTS)
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if wrong := sorted(name for name in {*wanted, *tensors} if name not in tensors or wanted.get(name) != tensors[name].shape):
            raise WeightsError(f"the image tokenizer's tensors do not fit its config: {', '.join(wrong[:5])}")
        model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise WeightsError(f"the image tokenizer's {WEIGHTS} is missing or damaged: {error}") from error
    return model.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

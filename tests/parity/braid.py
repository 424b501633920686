"""A tiny random checkpoint of the family "braid", streams of text and pictures for it, and the same model written out densely.

The dense model is the contract's words in float64, token by token where it can be: it shares no code with the model but the config.
Shape suffixes: T tokens, D width, N query heads, H head width.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from service.model.config import LayerAttention, ModelConfig, expected_shapes
from service.model.families import HF_NAMES, braid_config
from service.vocabulary import PictureIds

PICTURES = PictureIds(first_code=60, num_codes=32, rows=4, columns=5, begin_id=51, frame_id=52, end_id=53)
LOCAL = LayerAttention(window=17, sink=4, rope_base=1e4, radius=(1, 1))
CONFIG = ModelConfig(
    vocab_size=96,
    width=48,
    feed_forward_width=80,
    num_heads=4,
    num_kv_heads=2,
    head_width=16,
    layers=(LOCAL, LayerAttention(rope_base=1e4), LOCAL),
    max_context=160,
    has_tied_head=True,
    has_qk_norm=True,
    eos_ids=(2,),
    bos_id=1,
    pictures=PICTURES,
)


def codes(seed: int) -> list[int]:
    return [PICTURES.first_code + (seed * 7 + i * i + 3 * i) % PICTURES.num_codes for i in range(PICTURES.num_places)]


def text(seed: int, length: int) -> list[int]:
    return [3 + (seed * 11 + 5 * i * i + i) % 48 for i in range(length)]


# Text, a picture, text, a film of two frames, text.
STREAM = [
    *(1, *text(0, 6), PICTURES.begin_id, *codes(0), PICTURES.end_id),
    *(*text(1, 5), PICTURES.begin_id, *codes(1), PICTURES.frame_id, *codes(2), PICTURES.end_id, *text(2, 5)),
]
# A picture at once, and one that is under way.
OTHER = [PICTURES.begin_id, *codes(3), PICTURES.end_id, *text(4, 3), PICTURES.begin_id, *codes(5)[:9]]


def file_name(name: str) -> str:
    if not name.startswith("layers."):
        return HF_NAMES[name]
    _, index, part = name.split(".")
    return HF_NAMES["layers.{}." + part].format(index)


def random_weights(config: ModelConfig = CONFIG, seed: int = 7) -> dict[str, Tensor]:
    """By our names; so large that wrong attention, or a wrong place in the grid, shows."""
    generator = torch.Generator().manual_seed(seed)
    shapes = expected_shapes(config).items()
    return {name: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else 0.15) for name, shape in shapes}


def write_folder(folder: Path, weights: dict[str, Tensor], config: ModelConfig = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(braid_config(config)))
    save_file({file_name(name): tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def grid_starts(tokens: list[int]) -> list[int]:
    """A run of codes is cut into whole pictures from its front."""
    starts, run = [], 0
    for position, token in enumerate(tokens):
        is_code = PICTURES.first_code <= token < PICTURES.first_code + PICTURES.num_codes
        starts.append(position - run % PICTURES.num_places if is_code else -1)
        run = run + 1 if is_code else 0
    return starts


def sees(query: int, key: int, start: int, layer: LayerAttention) -> bool:
    """start: where the picture begins that the query is a code of, -1 without one."""
    if key > query or not (layer.window is None or query - key < layer.window or key < layer.sink):
        return False
    if layer.radius is None or start < 0 or key < start or key == query:
        return True
    row, column = divmod(key - start, PICTURES.columns)
    next_row, next_column = divmod(query + 1 - start, PICTURES.columns)
    return next_row - row <= layer.radius[0] and abs(next_column - column) <= layer.radius[1]


def dense_logits(weights: dict[str, Tensor], tokens: list[int], config: ModelConfig = CONFIG) -> Tensor:
    """float32 [T, V]."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["embedding"][tokens].clone()
    for position, start in enumerate(grid_starts(tokens)):
        if start >= 0:
            row, column = divmod(position - start, PICTURES.columns)
            x[position] += w["grid_rows"][row] + w["grid_columns"][column]
    for index, layer in enumerate(config.layers):
        part = {name.rpartition(".")[2]: tensor for name, tensor in w.items() if name.startswith(f"layers.{index}.")}
        x = x + _attention(_norm(x, part["attention_norm"], config), part, tokens, layer, config) @ part["out"].T
        h = _norm(x, part["mlp_norm"], config)
        x = x + (torch.nn.functional.silu(h @ part["gate"].T) * (h @ part["up"].T)) @ part["down"].T
    return (_norm(x, w["final_norm"], config) @ w["embedding"].T).float()


def _norm(x: Tensor, weight: Tensor, config: ModelConfig) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight


def _attention(h_TD: Tensor, part: dict[str, Tensor], tokens: list[int], layer: LayerAttention, config: ModelConfig) -> Tensor:
    q, k, v = ((h_TD @ part[name].T).view(len(tokens), -1, config.head_width) for name in ("q", "k", "v"))
    q, k = (_rotated(_norm(x, part[f"{name}_norm"], config), layer.rope_base) for name, x in (("q", q), ("k", k)))
    k, v = (x.repeat_interleave(config.num_heads // config.num_kv_heads, dim=1) for x in (k, v))
    starts, places = grid_starts(tokens), range(len(tokens))
    mask = torch.tensor([[sees(query, key, starts[query], layer) for key in places] for query in places])
    scores = torch.einsum("qnh,knh->nqk", q, k) / config.head_width**0.5
    y_TNH = torch.einsum("nqk,knh->qnh", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
    return y_TNH.flatten(1)


def _rotated(x_TNH: Tensor, base: float) -> Tensor:
    half = x_TNH.shape[-1] // 2
    angles = torch.arange(len(x_TNH)).double()[:, None, None] * base ** (-torch.arange(half).double() / half)
    first, second = x_TNH[..., :half], x_TNH[..., half:]
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1)

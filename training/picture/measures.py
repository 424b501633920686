"""How good an image tokenizer is, in figures: closeness, sharpness, how many codes it uses, and whether a thing keeps its codes.

Called by the tokenizer's stages, evaluation and ablations.
Shape suffixes: N pictures, Y and X pixels, R rows and W columns of codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.model.vq import VQTokenizer
from training.picture.losses import edges

Number = TypeVar("Number", bound=np.generic)
BATCH = 128


def to_tensor(pictures: NDArray[np.uint8], device: torch.device | str = "cpu") -> Tensor:
    """uint8 [N, Y, X, 3] to float32 [N, 3, Y, X] from -1 to 1, in the memory order that convolutions are fastest in."""
    scaled = torch.from_numpy(np.ascontiguousarray(pictures)).to(device).float() / 127.5 - 1
    return scaled.permute(0, 3, 1, 2)


def to_pictures(pixels_N3YX: Tensor) -> NDArray[np.uint8]:
    """The way back, clamped and rounded."""
    bounded = ((pixels_N3YX.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return bounded.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@torch.no_grad()
def encode(model: VQTokenizer, pictures: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Codes [N, R, W] of any number of pictures."""
    device = model.quantize.embedding.weight.device
    return np.concatenate([model.encode(to_tensor(part, device)).cpu().numpy() for part in _parts(pictures)])


@torch.no_grad()
def decode(model: VQTokenizer, codes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Pictures of any number of grids of codes."""
    device = model.quantize.embedding.weight.device
    return np.concatenate([to_pictures(model.decode(torch.from_numpy(part).to(device))) for part in _parts(codes)])


def _parts(array: NDArray[Number]) -> list[NDArray[Number]]:
    return [array[at : at + BATCH] for at in range(0, len(array), BATCH)]


def psnr(drawn: NDArray[np.uint8], real: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each picture in dB [N]; 60 where they are equal or nearly so."""
    error = np.square(drawn.astype(np.float64) - real).mean((1, 2, 3))
    return np.asarray(np.minimum(60.0, 10 * np.log10(255**2 / np.maximum(error, 1e-12))))


def gradient_energy_ratio(drawn: NDArray[np.uint8], real: NDArray[np.uint8]) -> float:
    """Energy of the edges of all drawn pictures over that of the real ones: below 1 is blurred, above 1 is rough."""
    return float(edges(to_tensor(drawn)).square().mean() / edges(to_tensor(real)).square().mean())


@dataclass(frozen=True, slots=True)
class CodeUse:
    """share: of the codebook that occurs at all; perplexity: of the codes' frequencies."""

    share: float
    perplexity: float


def code_use(codes: NDArray[np.int64], num_codes: int) -> CodeUse:
    counts = np.bincount(codes.ravel(), minlength=num_codes)
    shares = counts[counts > 0] / counts.sum()
    return CodeUse(float((counts > 0).mean()), float(np.exp(-(shares * np.log(shares)).sum())))


def stability(one: NDArray[np.int64], other: NDArray[np.int64], shown: NDArray[np.bool_]) -> float:
    """Share of equal codes at the places [N, R, W] that a thing takes in both of two scenes."""
    return float((one == other)[shown].mean())

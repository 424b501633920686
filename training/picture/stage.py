"""The two stages of the image tokenizer: first reconstruction, then an adversary for the decoder alone, so that codes stay valid.

Pictures come from a `PictureSource`; nothing here knows emoji or worlds. Called by the recipe.
Source: Esser et al. 2021 (VQGAN); that the encoder can rest in the second stage was measured, see docs/model.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from service.model.vq import VQTokenizer
from training.ahead import Ahead, num_workers
from training.loop import Precision, products_in
from training.picture.codebook import MovingCodebook
from training.picture.discriminator import PatchDiscriminator
from training.picture.losses import commitment, feature_matching, hinge_draw, hinge_judge, reconstruction
from training.picture.measures import code_use, decode, encode, gradient_energy_ratio, psnr, to_tensor
from training.picture.sheet import write_sheet
from training.ranks import Rank

PictureSource = Callable[[np.random.Generator, int], NDArray[np.uint8]]
"""Throws so many training pictures uint8 [N, Y, X, 3], augmented as it sees fit."""

MOST_NORM = 1.0


@dataclass(frozen=True, slots=True)
class PictureSettings:
    """batch: pictures of a rank and step. adversary_share and match_share weigh the second stage's losses; the adversary trains alone for
    alone_steps, then its weight grows over ramp_steps. free_steps: of the first stage, in which latents are not rounded: without them the
    latents of a fresh encoder lie so close together that one code serves all, and stay there (seen with norm "position")."""

    batch: int = 32
    learning_rate: float = 1.5e-3
    free_steps: int = 100
    edge_share: float = 0.5
    commitment_share: float = 0.25
    adversary_share: float = 0.05
    match_share: float = 0.3
    adversary_rate: float = 4e-4
    decoder_rate: float = 3e-4
    alone_steps: int = 50
    ramp_steps: int = 200
    precision: Precision = "auto"


class _PictureStage:
    """What both share: a batch, the held-out figures, the contact sheet."""

    def __init__(
        self, model: VQTokenizer, source: PictureSource, held_out: NDArray[np.uint8], settings: PictureSettings, rank: Rank, seed: int
    ) -> None:
        self.model, self.held_out, self.settings, self.rank = model, held_out, settings, rank
        self.device = model.quantize.embedding.weight.device
        throw = partial(_throw, source, settings.batch, seed, rank.index)
        self.thrown = Ahead(throw, num_workers(self.device, rank.count))

    def batch(self, step: int) -> Tensor:
        return to_tensor(self.thrown(step), self.device)

    def evaluate(self) -> Mapping[str, float]:
        with products_in(self.settings.precision, self.device):
            codes = encode(self.model, self.held_out)
            drawn = decode(self.model, codes)
        use = code_use(codes, self.model.config.num_codes)
        quality = psnr(drawn, self.held_out)
        return {
            "minus_psnr": -float(quality.mean()),
            "gradient_energy": gradient_energy_ratio(drawn, self.held_out),
            "codes_used": use.share,
            "perplexity": use.perplexity,
        }

    def picture(self, folder: Path) -> None:
        shown = self.held_out[:: max(1, len(self.held_out) // 24)][:24]
        with products_in(self.settings.precision, self.device):
            write_sheet(folder / "sheet.png", [shown, decode(self.model, encode(self.model, shown))])


def _throw(source: PictureSource, count: int, seed: int, rank: int, step: int) -> NDArray[np.uint8]:
    return source(np.random.default_rng((seed, step, rank)), count)


class ReconstructionStage(_PictureStage):
    """L1, edges and commitment; the codebook moves by itself."""

    name = "tokenizer"

    def __init__(
        self, model: VQTokenizer, source: PictureSource, held_out: NDArray[np.uint8], settings: PictureSettings, rank: Rank, seed: int
    ) -> None:
        super().__init__(model, source, held_out, settings, rank, seed)
        self.book = MovingCodebook(model.config.num_codes).to(self.device)
        self.module: nn.Module = nn.ModuleDict({"model": model, "book": self.book})
        model.quantize.embedding.weight.requires_grad_(False)
        self.learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizers = [torch.optim.AdamW(self.learned, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)]

    def step(self, step: int) -> Mapping[str, float]:
        model, settings = self.model, self.settings
        real = self.batch(step)
        with products_in(settings.precision, self.device):
            latents = model.latents(real)
            codes = model.nearest(latents.detach())
            rounded = model.codebook[codes]
            is_free = step < settings.free_steps
            drawn = model.pixels(latents if is_free else latents + (rounded - latents).detach()).float()
        shape = reconstruction(drawn, real, settings.edge_share)
        tie = commitment(latents, rounded)
        (shape + (0.0 if is_free else settings.commitment_share) * tie).backward()  # type: ignore[no-untyped-call]
        self.rank.average_gradients(self.learned)
        clip_grad_norm_(self.learned, MOST_NORM)
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()
        table, flat = model.quantize.embedding.weight, latents.detach().flatten(0, 2)
        restarts = self.book.update(table, flat, codes.flatten(), self.rank)
        return {"loss": shape.item(), "commitment": tie.item(), "restarts": float(restarts)}


class AdversarialStage(_PictureStage):
    """The decoder against a PatchGAN; encoder and codebook rest, so every code means what it meant."""

    name = "adversarial"

    def __init__(
        self, model: VQTokenizer, source: PictureSource, held_out: NDArray[np.uint8], settings: PictureSettings, rank: Rank, seed: int
    ) -> None:
        super().__init__(model, source, held_out, settings, rank, seed)
        self.judge = PatchDiscriminator().to(self.device)
        self.module = nn.ModuleDict({"model": model, "judge": self.judge})
        model.requires_grad_(False)
        self.learned = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
        for parameter in self.learned:
            parameter.requires_grad_(True)
        betas = (0.5, 0.9)
        self.optimizers = [
            torch.optim.AdamW(self.learned, lr=settings.decoder_rate, betas=betas, weight_decay=0.0, fused=True),
            torch.optim.AdamW(self.judge.parameters(), lr=settings.adversary_rate, betas=betas, weight_decay=0.0, fused=True),
        ]

    def step(self, step: int) -> Mapping[str, float]:
        real = self.batch(step)
        with products_in(self.settings.precision, self.device):
            with torch.no_grad():
                latents = self.model.codebook[self.model.encode(real)]
            drawn = self.model.pixels(latents).float()
        judged = self._judge_step(real, drawn.detach())
        growth = min(1.0, max(0.0, (step - self.settings.alone_steps) / self.settings.ramp_steps))
        return {**self._draw_step(real, drawn, growth), "judge": judged}

    def _judge_step(self, real: Tensor, drawn: Tensor) -> float:
        loss = hinge_judge(self.judge(real)[0], self.judge(drawn)[0])
        loss.backward()  # type: ignore[no-untyped-call]
        self.rank.average_gradients(self.judge.parameters())
        self.optimizers[1].step()
        self.optimizers[1].zero_grad()
        return loss.item()

    def _draw_step(self, real: Tensor, drawn: Tensor, growth: float) -> Mapping[str, float]:
        settings = self.settings
        scores, features = self.judge(drawn)
        with torch.no_grad():
            wanted = self.judge(real)[1]
        shape = reconstruction(drawn, real, settings.edge_share)
        fooled, matched = hinge_draw(scores), feature_matching(features, wanted)
        (shape + growth * (settings.adversary_share * fooled + settings.match_share * matched)).backward()  # type: ignore[no-untyped-call]
        self.rank.average_gradients(self.learned)
        clip_grad_norm_(self.learned, MOST_NORM)
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()
        self.optimizers[1].zero_grad()
        return {"loss": shape.item(), "fooled": fooled.item(), "matched": matched.item()}

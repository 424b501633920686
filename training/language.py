"""How the decoder learns: one stage for pre-training and for many tasks at once, which differ in their mix of documents alone.

Called by the recipes. The mix is a function; nothing here knows emoji, worlds or texts.
Shape suffixes: U rows of documents, L places of a row, M targets, N pictures, R rows and W columns of codes, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer

from service.model.transformer import Transformer
from service.vocabulary import PictureIds
from training.adapt import MATRICES, Adapters, learn_only_codes
from training.ahead import Ahead
from training.decoder import hidden
from training.loop import Precision, products_in
from training.muon import Muon
from training.ranks import Rank
from training.stream.batch import Batch, batches, packed
from training.stream.document import Codes, CodesLater, Document, Pixels, with_codes

Mix = Callable[[np.random.Generator, int], Sequence[Document]]
"""Throws documents of about so many tokens in all."""

MOST_NORM = 1.0
MEASURED_TOKENS = 16_384
"""Whose losses are computed at once; of a vocabulary of 50,000 that is 3 GB of logits."""


@dataclass(frozen=True, slots=True)
class LanguageSettings:
    """tokens: of a rank and step, about. optimizer: of the layers' matrices; "muon" orthogonalises their updates (training/muon.py) and
    takes the same learning rate, all else learns by AdamW. noise: share of an answer's codes that the model reads disturbed (the target
    stays clean). text_weight: of a text target's loss, a code's is 1. lora_rank: of adapters beside the layers' matrices, which
    stay as they are, and so do the rows of text in the embedding; AdamW without decay, whatever `optimizer` says. 0 trains everything."""

    tokens: int = 3072
    learning_rate: float = 2e-3
    optimizer: Literal["adamw", "muon"] = "muon"
    weight_decay: float = 0.05
    noise: float = 0.05
    text_weight: float = 1.0
    lora_rank: int = 0
    precision: Precision = "auto"


@dataclass(frozen=True, eq=False, slots=True)
class Elsewhere:
    """How batches are made beside the training: by so many processes, in packed rows, their codes found here by `encode`, which takes
    pictures uint8 [N, S, S, 3] and gives int64 [N, R, W]. later: what the mixes were given as image tokenizer."""

    workers: int
    later: CodesLater
    encode: Callable[[Pixels], Codes]


@dataclass(frozen=True, eq=False, slots=True)
class _Made:
    """A step's batches. pictures: whose codes the unknown ids stand for."""

    parts: Sequence[Batch]
    pictures: Pixels | None = None


@dataclass(frozen=True, eq=False, slots=True)
class _Maker:
    """Makes the batches of a step, as far as numpy can. later: with it, all documents go into rows of `row` ids."""

    mixes: Sequence[tuple[int, Mix]]
    tokens: int
    pictures: PictureIds
    pad_id: int
    row: int
    later: CodesLater | None
    seed: int
    rank: int

    def __call__(self, step: int) -> _Made:
        random = np.random.default_rng((self.seed, step, self.rank))
        mix = [each for start, each in self.mixes if start <= step][-1]
        documents = mix(random, self.tokens)
        if self.later is None:
            return _Made(list(batches(documents, self.pictures, self.pad_id)))
        return _Made([packed(documents, self.pictures, self.pad_id, self.row)], self.later.taken())


class LanguageStage:
    """near int64 [codes, k]: the codes most like each, itself left out; disturbed codes are drawn from them."""

    def __init__(
        self,
        name: str,
        model: Transformer,
        mix: Mix,
        held_out: Mapping[str, Sequence[Document]],
        settings: LanguageSettings,
        *,
        later: Sequence[tuple[int, Mix]] = (),
        adapters: Adapters | None = None,
        near: Tensor | None = None,
        elsewhere: Elsewhere | None = None,
        pad_id: int,
        rank: Rank,
        seed: int,
    ) -> None:
        """held_out: documents by name; early stopping watches the mean of their losses. later: what takes the mix's place, by the step from
        which it does, in their order. adapters: of this model, when they are learned in its matrices' place."""
        if model.config.pictures is None:
            raise ValueError("a language stage teaches models that know pictures")
        self.name, self.model, self.settings, self.rank = name, model, settings, rank
        self.module: nn.Module = model if adapters is None else nn.ModuleDict({"model": model, "adapters": adapters})
        self.pictures: PictureIds = model.config.pictures
        self.near, self.pad_id, self.held_out, self.elsewhere = near, pad_id, held_out, elsewhere
        self.device = model.final_norm.device
        row, unknown = model.config.max_context, elsewhere.later if elsewhere else None
        maker = _Maker([(0, mix), *later], settings.tokens, self.pictures, pad_id, row, unknown, seed, rank.index)
        self.made = Ahead(maker, elsewhere.workers if elsewhere else 0)
        if adapters is not None:
            learn_only_codes(model)
        self.learned = [each for each in dict.fromkeys(self.module.parameters()) if each.requires_grad]
        self.optimizers = optimizers_of(self.module, settings, rank)

    def step(self, step: int) -> Mapping[str, float]:
        parts = self._known(self.made(step))
        weight = torch.tensor(sum(float(self._weights(part).sum()) for part in parts), device=self.device)
        self.rank.sum([weight])
        sums = torch.zeros(4, device=self.device)
        for part in parts:
            losses, weights, is_code = self.losses(part, self.settings.noise)
            (losses @ weights * (self.rank.count / weight)).backward()  # type: ignore[no-untyped-call]
            own = losses.detach()
            sums += torch.stack([own @ is_code.float(), is_code.sum(), own @ (~is_code).float(), (~is_code).sum()])
        self.rank.average_gradients(self.learned)
        norm = clip_grad_norm_(self.learned, MOST_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        code, num_codes, text, num_texts, length = torch.cat([sums, norm.reshape(1)]).tolist()  # the step's one wait for a GPU
        means = {"code": code / max(num_codes, 1), "text": text / max(num_texts, 1)}
        return {**means, "norm": length, "tokens": float(sum(part.read.size for part in parts))}

    def _known(self, made: _Made) -> Sequence[Batch]:
        """The batches with codes where ids only stood for them."""
        if made.pictures is None or self.elsewhere is None:
            return made.parts
        codes = self.elsewhere.encode(made.pictures).ravel() + self.pictures.first_code
        return [replace(part, read=with_codes(part.read, codes), say=with_codes(part.say, codes)) for part in made.parts]

    def losses(self, batch: Batch, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Nats of every target [M], its weight [M], and whether it is a code [M]. noise: share of disturbed codes."""
        read, say, counts = (self._here(array) for array in (batch.read, batch.say, batch.counts))
        grid, begin = (None if each is None else self._here(each) for each in (batch.grid_start, batch.document_start))
        if noise and self.near is not None:
            read = self._disturbed(read, counts, noise)
        with products_in(self.settings.precision, self.device):
            losses = target_nats(self.model, read, say, counts, grid, begin)
        is_code = say[counts] >= self.pictures.first_code
        return losses, torch.where(is_code, 1.0, self.settings.text_weight), is_code

    def _here(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _weights(self, batch: Batch) -> Tensor:
        targets = torch.from_numpy(batch.say[batch.counts])
        return torch.where(targets >= self.pictures.first_code, 1.0, self.settings.text_weight)

    def _disturbed(self, read_UL: Tensor, counts_UL: Tensor, share: float) -> Tensor:
        """The same ids with a share of the answers' codes replaced by codes most like them."""
        assert self.near is not None
        first = self.pictures.first_code
        is_own = torch.zeros_like(counts_UL)
        is_own[:, 1:] = counts_UL[:, :-1]  # what was said a place before is read here
        chosen = is_own & (read_UL >= first) & (torch.rand(read_UL.shape, device=read_UL.device) < share)
        which = torch.randint(self.near.shape[1], read_UL.shape, device=read_UL.device)
        other = self.near[(read_UL - first).clamp(min=0), which] + first
        return torch.where(chosen, other, read_UL)

    def evaluate(self) -> Mapping[str, float]:
        """Mean nats of each held-out set's targets, and their mean in front."""
        with products_in(self.settings.precision, self.device):
            nats = {name: document_nats(self.model, documents, self.pictures, self.pad_id) for name, documents in self.held_out.items()}
        found = {name: float(each.mean()) for name, each in nats.items()}
        return {"held_out": float(np.mean(list(found.values()))), **found}

    def picture(self, folder: Path) -> None:
        """A language stage's pictures are drawn by evaluation, which costs more than a moment."""


def target_nats(
    model: Transformer, read_UL: Tensor, say_UL: Tensor, counts_UL: Tensor, grid_UL: Tensor | None, document_start_UL: Tensor | None = None
) -> Tensor:
    """Nats of every target, float32 [M]; see `Batch`."""
    x, residual = hidden(model, read_UL, grid_UL, document_start_UL)
    logits = model.logits(x, residual, counts_UL.flatten().nonzero()[:, 0])
    return F.cross_entropy(logits.float(), say_UL[counts_UL], reduction="none")


@torch.no_grad()
def document_nats(model: Transformer, documents: Sequence[Document], pictures: PictureIds, pad_id: int) -> Tensor:
    """Nats of every target of documents, float32 [M] on the CPU, in no order that means something. model: on the training back end."""
    device = model.final_norm.device
    found = [torch.empty(0)]
    for part in batches(documents, pictures, pad_id, MEASURED_TOKENS):
        read, say, counts = (torch.from_numpy(array).to(device) for array in (part.read, part.say, part.counts))
        grid = None if part.grid_start is None else torch.from_numpy(part.grid_start).to(device)
        found.append(target_nats(model, read, say, counts, grid).cpu())
    return torch.cat(found)


def optimizers_of(module: nn.Module, settings: LanguageSettings, rank: Rank) -> list[Optimizer]:
    """One optimiser, or with Muon two."""
    named = {name: each for name, each in module.named_parameters() if each.requires_grad}
    matrices = [each for name, each in named.items() if name.rsplit(".", 1)[-1] in MATRICES]
    rest = [each for name, each in named.items() if name.rsplit(".", 1)[-1] not in MATRICES]
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "adamw" or not matrices:
        groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
        return [AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)]
    others = AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    return [Muon(matrices, rate, decay, rank), others]


def nearest_codes(codebook_KE: Tensor, count: int = 8) -> Tensor:
    """int64 [codes, count]: the codes most like each one, itself left out."""
    return (codebook_KE @ codebook_KE.T).topk(count + 1, dim=-1).indices[:, 1:].contiguous()

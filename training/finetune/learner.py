"""A decoder of any checkpoint with what is learned on top of it: adapters or all weights, and a head of classes where there is one.

Knows no files of examples and no loop. Called by the stage, the command and the export.
Shape suffixes: U documents, L places of a document, R answered places, D width, C classes or the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from service.errors import StartupError
from service.model.families import read_config
from service.model.layers import DecoderLayer
from service.model.transformer import Transformer
from service.model.weights import open_weights
from training.adapt import Adapters, BothWays, adapted_ops
from training.decoder import hidden, teachable
from training.finetune.examples import Example


@dataclass(frozen=True, slots=True)
class Adaptation:
    """rank 0 trains all weights, alpha scales the adapters' product. frozen_layers: the lowest, which stay as they are, the embedding with
    them (and so a head tied to it). is_causal: does a place see only what is before it?"""

    rank: int = 16
    alpha: float = 32.0
    frozen_layers: int = 0
    is_causal: bool = True


class Learner:
    """module: all that is learned, which is what a checkpoint of the run holds. head [C, D] and its bias; None when the answer is the next
    id. path: of the checkpoint that it started from."""

    def __init__(self, path: Path, adaptation: Adaptation, num_classes: int | None, seed: int, device: torch.device | str = "cpu") -> None:
        """Raises: WeightsError, StartupError for a checkpoint that can't be taught, or more frozen layers than there are."""
        config = read_config(path)
        if config.has_post_norms or config.embedding_scale != 1.0:  # an export would have to write its norms as they were stored
            raise StartupError(f"{path.name} can't be taught: Gemma's families are served alone so far")
        if config.experts is not None:
            raise StartupError(f"{path.name} can't be taught: mixtures of experts are served alone so far")
        if adaptation.frozen_layers > len(config.layers):
            raise StartupError(f"{adaptation.frozen_layers} layers can't be frozen: the model has {len(config.layers)}")
        self.path, self.adaptation = path, adaptation
        self.both_ways = None if adaptation.is_causal else BothWays()
        adapters: list[Adapters] = []
        self.model: Transformer = teachable(config, open_weights(path, config), device, adapted_ops(adapters, self.both_ways))
        torch.manual_seed(seed)
        self.head = None if num_classes is None else nn.Linear(config.width, num_classes, device=device)
        self.adapters = Adapters(self.model, adaptation.rank, adaptation.alpha, adaptation.frozen_layers) if adaptation.rank else None
        adapters += [self.adapters] if self.adapters is not None else []
        self._freeze()
        parts = {"decoder": None if self.adapters else self.model, "adapters": self.adapters, "head": self.head}
        self.module: nn.Module = nn.ModuleDict({name: part for name, part in parts.items() if part is not None})

    def _freeze(self) -> None:
        frozen = self.adaptation.frozen_layers
        if self.adapters is not None:
            self.model.requires_grad_(False)
        elif frozen:
            cast(nn.Parameter, self.model.embedding).requires_grad_(False)
            for layer in cast(list[DecoderLayer], list(self.model.layers))[:frozen]:
                layer.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.model.final_norm.device

    @property
    def learned(self) -> list[nn.Parameter]:
        return [each for each in self.module.parameters() if each.requires_grad]

    def answers(self, examples: Sequence[Example]) -> Tensor:
        """float32 [R, C]: scores at every place of the examples, one example behind the other."""
        lengths = [len(each.ids) for each in examples]
        length = max(lengths)
        ids = torch.zeros((len(examples), length), dtype=torch.int64)
        for row, each in enumerate(examples):
            ids[row, : len(each.ids)] = torch.tensor(each.ids)
        rows = torch.tensor([row * length + place for row, each in enumerate(examples) for place in each.places], device=self.device)
        if self.both_ways is not None:
            self.both_ways.lengths = torch.tensor(lengths, device=self.device)
        x, residual = hidden(self.model, ids.to(self.device), None)
        if self.head is None:
            return self.model.logits(x, residual, rows)
        return cast(Tensor, self.head(self.model.hidden(x, residual, rows).float())).float()

    def settle(self) -> None:
        """Puts the adapters into the matrices and rounds everything to bfloat16, so that what is measured next is what is exported.

        Mutates: all weights.
        """
        if self.adapters is not None:
            self.adapters.merge()
        with torch.no_grad():
            for parameter in [*self.model.parameters(), *(self.head.parameters() if self.head is not None else ())]:
                parameter.copy_(parameter.to(torch.bfloat16))

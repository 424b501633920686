"""Texts as vectors, of two kinds that know nothing of each other: a decoder's hidden states, and a sentence encoder's.

The decoder reads whole texts on the back end that serves it. Called by the experiment.
Shape suffixes: X texts, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kernels.ops import PagedBatch, PagedKV
from service.codec.prompt import Codec
from service.model.encoder import Encoder
from service.model.transformer import Transformer
from training.adversary.classifier import Features

BLOCK = 16


@torch.inference_mode()
def decoder_features(model: Transformer, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]], batch: int = 32) -> Features:
    """[X, D]: the mean of the last hidden states over the reply, which the prompt stands before. No reply may be empty."""
    found = []
    for at in range(0, len(prompts), batch):
        pairs = list(zip(prompts[at : at + batch], replies[at : at + batch], strict=True))
        lengths = torch.tensor([len(prompt) + len(reply) for prompt, reply in pairs])
        x, residual = _read(model, [[*prompt, *reply] for prompt, reply in pairs], lengths)
        states = model.restore(model.hidden(x, residual, torch.arange(len(x), device=x.device)))
        for (_, reply), end in zip(pairs, lengths.cumsum(0).tolist(), strict=True):
            found.append(states[end - len(reply) : end].double().mean(0).cpu().numpy())
    return np.stack(found)


def _read(model: Transformer, texts: Sequence[Sequence[int]], lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(x, residual) [T, D] of all texts, one behind the other."""
    config, device = model.config, model.final_norm.device
    num_blocks = -(-lengths // BLOCK)
    ends = lengths.cumsum(0)
    owner = torch.repeat_interleave(torch.arange(len(texts)), lengths)
    positions = torch.arange(int(ends[-1])) - (ends - lengths)[owner]
    first = num_blocks.cumsum(0) - num_blocks
    table = first[:, None] + torch.minimum(torch.arange(int(num_blocks.max())), num_blocks[:, None] - 1)
    batch = PagedBatch(
        slots=((first[owner] + positions // BLOCK) * BLOCK + positions % BLOCK).to(device),
        block_table=table.int().to(device),
        query_start=torch.cat((torch.zeros(1, dtype=torch.int64), ends)).int().to(device),
        context_len=lengths.int().to(device),
        num_decodes=0,
        max_query_len=int(lengths.max()),
        max_context_len=int(lengths.max()),
    )
    shape = (int(num_blocks.sum()), config.num_kv_heads, config.head_width, BLOCK)
    kv = []
    for _ in config.layers:
        keys, values = (torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(2))
        kv.append(PagedKV(keys.transpose(2, 3), values.view(shape[0], config.num_kv_heads, BLOCK, -1), batch))
    ids = torch.tensor([token for text in texts for token in text], device=device)
    result: tuple[Tensor, Tensor] = model(ids, positions.to(device), kv)
    return result


@dataclass(frozen=True, eq=False)
class Reader:
    """Features by a sentence encoder: the reply's vector, and its product with the prompt's place by place, whose sum is how near they are.

    known: vectors of texts that were read before; every set of replies has the same prompts.
    """

    encoder: Encoder
    codec: Codec
    known: dict[str, Features] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[str], replies: Sequence[str]) -> Features:
        """[X, 2 * D]. Mutates: known."""
        fresh = [each for each in dict.fromkeys(prompts) if each not in self.known]
        self.known.update(zip(fresh, self._vectors(fresh), strict=True))
        own, before = self._vectors(replies), np.stack([self.known[each] for each in prompts])
        return np.concatenate((own, own * before), axis=1)

    @torch.inference_mode()
    def _vectors(self, texts: Sequence[str], batch: int = 32) -> Features:
        """[X, D]: the mean of the encoder's vectors over each text, its length 1."""
        found = []
        for at in range(0, len(texts), batch):
            ids = [self.codec.encode_document(text) for text in texts[at : at + batch]]
            for own in torch.split(self.encoder(ids), [len(each) for each in ids]):
                mean = own.double().mean(0)
                found.append((mean / mean.norm()).cpu().numpy())
        return np.stack(found) if found else np.zeros((0, self.encoder.embedding.shape[1]))

"""How the image tokenizer's codebook learns: moving means on the unit sphere, and codes that nobody uses start again.

No gradient reaches the codebook. Called by the tokenizer's stage.
Shape suffixes: K codes, E numbers of a code, M latents.
Source: van den Oord et al. 2017, appendix A.1 (moving means); Yu et al. 2022 (ViT-VQGAN), section 3.2 (codes of length 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.ranks import Rank

DECAY = 0.97
DEAD_STEPS = 20
"""Steps without use after which a code is replaced by a latent of the batch."""


class MovingCodebook(nn.Module):
    """Keeps how long each code has been idle; the codes themselves stay in the tokenizer. idle int64 [K]."""

    idle: Tensor

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.register_buffer("idle", torch.zeros(num_codes, dtype=torch.int64))

    @torch.no_grad()
    def update(self, table_KE: Tensor, latents_ME: Tensor, codes_M: Tensor, rank: Rank) -> int:
        """Moves every used code towards the mean of its latents and replaces idle ones; returns how many were replaced.

        Mutates: table, self.idle. All ranks end with the same table.
        """
        counts = torch.zeros(len(table_KE), device=table_KE.device).index_add_(0, codes_M, torch.ones_like(codes_M, dtype=torch.float32))
        sums = torch.zeros_like(table_KE).index_add_(0, codes_M, latents_ME)
        rank.sum([counts, sums])
        used = counts > 0
        means = sums[used] / counts[used, None]
        table_KE[used] = F.normalize(DECAY * F.normalize(table_KE[used], dim=-1) + (1 - DECAY) * means, dim=-1)
        self.idle[used] = 0
        self.idle[~used] += 1
        return self._restart(table_KE, latents_ME, rank)

    def _restart(self, table_KE: Tensor, latents_ME: Tensor, rank: Rank) -> int:
        dead = (self.idle >= DEAD_STEPS).nonzero()[:, 0]
        if not len(dead):
            return 0
        chosen = torch.randint(len(latents_ME), (len(dead),), device=latents_ME.device)
        fresh = latents_ME[chosen] if rank.is_first else torch.zeros_like(latents_ME[chosen])
        rank.sum([fresh])
        table_KE[dead] = fresh
        self.idle[dead] = 0
        return len(dead)

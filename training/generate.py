"""Generation outside the server: many prompts at once on paged K/V, by a serving back end. For evaluation and contact sheets.

The grammar of pictures holds: after a begin or frame id come exactly rows x columns codes, elsewhere none. One batch lives from its
prompts to its last end; nothing is scheduled. Called by evaluation and by ablations.
Shape suffixes: S sequences, V vocabulary, R sampled rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import PagedBatch, PagedKV, SampleRows
from service.model.transformer import Transformer
from service.runner.kv_cache import as_kept
from service.vocabulary import PictureIds

BLOCK = 16
FREE = -1
"""In place of a number of frames: the model begins and ends pictures, and chooses between them and words, by itself."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy. The seed and a sequence's number key the noise, so batches of other sizes draw the same ids."""

    temperature: float = 0.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int = 0
    max_tokens: int = 128


@dataclass(slots=True)
class _Sequence:
    """What a sequence has, and where in a picture it stands: codes that its open picture still wants, and whether it may begin another.

    is_free: is that the model's choice? is_between: of a free one, has a picture just become full?
    """

    ids: list[int]
    prompt_len: int
    blocks: list[int]
    wanted: int = 0
    is_open: bool = False
    is_free: bool = False
    is_between: bool = False
    frames_left: int = 0
    grid_start: int = -1
    is_done: bool = False
    noise_index: int = 0

    @property
    def mask(self) -> str:
        """Which ids may come next."""
        if self.wanted:
            return "code"
        return "between" if self.is_between else "any" if self.is_free else "text"


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    eos_id: int,
    num_frames: Sequence[int] | None = None,
    batch: int = 64,
) -> list[list[int]]:
    """The ids after each prompt, without the end. num_frames: of each sequence's answer; a positive number opens a picture at once and
    ends the answer behind its last frame, 0 (or None for all) lets the model speak, without pictures, FREE leaves all that to the model.

    Raises: ValueError for pictures of a model that knows none.
    """
    frames = list(num_frames) if num_frames is not None else [0] * len(prompts)
    pictures = model.config.pictures or _no_pictures(model.config.vocab_size)
    if model.config.pictures is None and any(frames):
        raise ValueError("pictures can be asked of models that know pictures only")
    order = sorted(range(len(prompts)), key=lambda index: (frames[index], len(prompts[index])))
    found: dict[int, list[int]] = {}
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        run = _Run(model, pictures, sampling, eos_id)
        for index, reply in zip(chosen, run.all([prompts[i] for i in chosen], [frames[i] for i in chosen], chosen), strict=True):
            found[index] = reply
    return [found[index] for index in range(len(prompts))]


class _Run:
    def __init__(self, model: Transformer, pictures: PictureIds, sampling: Sampling, eos_id: int) -> None:
        self.model, self.pictures, self.sampling, self.eos_id = model, pictures, sampling, eos_id
        config = model.config
        is_code = torch.zeros(config.vocab_size, dtype=torch.bool)
        is_code[pictures.first_code : pictures.first_code + pictures.num_codes] = True
        is_text = ~is_code
        marks = [each for each in (pictures.begin_id, pictures.frame_id, pictures.end_id) if each < config.vocab_size]
        is_text[marks] = False
        is_any, is_between = is_text.clone(), torch.zeros_like(is_text)
        is_any[marks[:1]] = True
        is_between[marks[1:]] = True
        masks = {"code": is_code, "text": is_text, "any": is_any, "between": is_between}
        self.masks = {name: _packed(mask) for name, mask in masks.items()}
        self.device = model.final_norm.device

    def all(self, prompts: Sequence[Sequence[int]], frames: Sequence[int], numbers: Sequence[int]) -> list[list[int]]:
        sequences = self._begin(prompts, frames, numbers)
        kv = self._cache(sequences)
        live = sequences
        pending = [each.ids for each in live]
        while live:
            rows = self._forward(live, pending, kv)
            drawn = self._sample(live, rows)
            pending = []
            for each, token in zip(live, drawn, strict=True):
                pending.append(self._append(each, token))
            keep = [index for index, each in enumerate(live) if not each.is_done]
            live, pending = [live[index] for index in keep], [pending[index] for index in keep]
        return [each.ids[each.prompt_len :] for each in sequences]

    def _begin(self, prompts: Sequence[Sequence[int]], frames: Sequence[int], numbers: Sequence[int]) -> list[_Sequence]:
        sequences, free = [], 0
        for prompt, count, number in zip(prompts, frames, numbers, strict=True):
            ids = [*prompt, self.pictures.begin_id] if count > 0 else list(prompt)
            room = len(ids) + (count * (self.pictures.num_places + 1) if count > 0 else self.sampling.max_tokens) + 1
            blocks = list(range(free, free + -(-room // BLOCK)))
            free += len(blocks)
            wanted = self.pictures.num_places if count > 0 else 0
            left = max(count - 1, 0)
            sequences.append(_Sequence(ids, len(prompt), blocks, wanted, count > 0, count == FREE, frames_left=left, noise_index=number))
        return sequences

    def _cache(self, sequences: Sequence[_Sequence]) -> list[PagedKV]:
        config = self.model.config
        num_blocks = max(each.blocks[-1] for each in sequences) + 1
        shape = (num_blocks, config.num_kv_heads, BLOCK, config.head_width)
        nothing = PagedBatch(*(torch.empty(0),) * 4, 0, 0, 0)
        layers = []
        for _ in config.layers:
            keys, values = (torch.zeros(shape, dtype=self.model.dtype, device=self.device) for _ in range(2))
            layers.append(PagedKV(as_kept(keys), values, nothing))
        return layers

    def _forward(self, live: Sequence[_Sequence], pending: Sequence[Sequence[int]], kv: list[PagedKV]) -> Tensor:
        """float32 logits [S, V] behind each sequence's last pending id."""
        starts = [len(each.ids) - len(ids) for each, ids in zip(live, pending, strict=True)]
        grids = [self._grids(each, ids, start) for each, ids, start in zip(live, pending, starts, strict=True)]
        # The contract wants sequences with one query first; prompts of one id do not occur among longer ones.
        lengths = torch.tensor([len(ids) for ids in pending])
        ends = lengths.cumsum(0)
        positions = torch.cat([torch.arange(start, start + len(ids)) for start, ids in zip(starts, pending, strict=True)])
        owner = torch.repeat_interleave(torch.arange(len(live)), lengths)
        table = torch.zeros((len(live), max(len(each.blocks) for each in live)), dtype=torch.int32)
        for row, each in enumerate(live):
            table[row, : len(each.blocks)] = torch.tensor(each.blocks)
        flat_grids = torch.tensor([start for row in grids for start in row], dtype=torch.int32)
        is_decode = bool((lengths == 1).all())
        contexts = torch.tensor([len(each.ids) for each in live], dtype=torch.int32)
        batch = PagedBatch(
            slots=(table[owner, positions // BLOCK].long() * BLOCK + positions % BLOCK).to(self.device),
            block_table=table.to(self.device),
            query_start=torch.cat((torch.zeros(1, dtype=torch.int64), ends)).int().to(self.device),
            context_len=contexts.to(self.device),
            num_decodes=len(live) if is_decode else 0,
            max_query_len=0 if is_decode else int(lengths.max()),
            max_context_len=int(contexts.max()),
            grid_start=flat_grids.to(self.device) if bool((flat_grids >= 0).any()) else None,
        )
        for layer in kv:
            layer.batch = batch
        ids = torch.tensor([token for row in pending for token in row], device=self.device)
        x, residual = self.model(ids, positions.to(self.device), kv)
        return self.model.logits(x, residual, (ends - 1).to(self.device))

    def _grids(self, each: _Sequence, ids: Sequence[int], start: int) -> list[int]:
        """Mutates: each.grid_start."""
        found = self.pictures.grid_starts(ids, start, each.grid_start)
        each.grid_start = found[-1]
        return found

    def _sample(self, live: Sequence[_Sequence], logits: Tensor) -> list[int]:
        count, sampling = len(live), self.sampling
        mask = torch.stack([self.masks[each.mask] for each in live]).to(self.device)
        rows = SampleRows(
            temperature=torch.full((count,), sampling.temperature, device=self.device),
            top_k=torch.full((count,), sampling.top_k, dtype=torch.int32, device=self.device),
            top_p=torch.ones(count, device=self.device),
            min_p=torch.full((count,), sampling.min_p, device=self.device),
            seeds=torch.tensor([sampling.seed * 1_000_003 + each.noise_index for each in live], device=self.device),
            positions=torch.tensor([len(each.ids) for each in live], device=self.device),
            mask=mask,
        )
        return [int(token) for token in self.model.ops.sample(logits, rows).ids]

    def _append(self, each: _Sequence, token: int) -> list[int]:
        """Takes a drawn id in and says which ids the next step computes. Mutates: each."""
        if token == self.eos_id:
            each.is_done = True
            return []
        fresh = [token]
        if each.is_free:
            self._follow(each, token)
        elif each.wanted:
            each.wanted -= 1
            if not each.wanted and each.frames_left:
                each.frames_left -= 1
                each.wanted = self.pictures.num_places
                fresh.append(self.pictures.frame_id)
            elif not each.wanted:
                fresh.append(self.pictures.end_id)
                each.is_done = True
        each.ids += fresh
        if not each.is_open and len(each.ids) - each.prompt_len >= self.sampling.max_tokens:
            each.is_done = True
        return fresh

    def _follow(self, each: _Sequence, token: int) -> None:
        """Mutates: where a free sequence stands."""
        if each.wanted:
            each.wanted -= 1
            each.is_between = not each.wanted
            return
        each.is_between = False
        if token in (self.pictures.begin_id, self.pictures.frame_id):
            each.wanted = self.pictures.num_places


def _no_pictures(vocab_size: int) -> PictureIds:
    """Of a model of text alone: no codes, and marks that are no ids."""
    return PictureIds(vocab_size, 0, 1, 1, vocab_size, vocab_size, vocab_size)


def _packed(allowed_V: Tensor) -> Tensor:
    """int32 words of 32 bits each, as `SampleRows.mask` has them."""
    padded = torch.zeros(-(-len(allowed_V) // 32) * 32, dtype=torch.int64)
    padded[: len(allowed_V)] = allowed_V.long()
    words = (padded.view(-1, 32) << torch.arange(32)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()

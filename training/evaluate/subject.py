"""What is measured: a decoder with its image tokenizer, vocabulary and data, and the few ways to ask it something.

Judges nothing. Built from an artefact of any size; called by every part of evaluation and by ablations.
Shape suffixes: N answers, F frames, R rows and W columns of codes, U documents, M targets, S pixels of a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray

from kernels.ops import select_ops
from service.errors import WeightsError
from service.model.families import read_config
from service.model.transformer import Precision, Transformer, build_transformer
from service.model.vq import VQTokenizer
from service.model.weights import open_weights
from service.vocabulary import PictureIds
from training.decoder import NamedSource, named_tensors, teachable
from training.export import load_image_tokenizer
from training.generate import FREE, Sampling, generate
from training.language import document_nats
from training.materials import Materials, Streams
from training.picture.measures import decode, encode
from training.stream.document import Codes, Document, Pixels, Scribe, Talk
from training.tokens import EOS_ID, PAD_ID

GREEDY = Sampling()


@dataclass(frozen=True, eq=False)
class Subject:
    """model: on a serving back end, for answers. learner: the same weights on the training back end, for losses."""

    model: Transformer
    learner: Transformer
    streams: Streams
    seed: int = 0

    @property
    def scribe(self) -> Scribe:
        return self.streams.scribe

    @property
    def vq(self) -> VQTokenizer:
        return self.streams.vq

    @property
    def materials(self) -> Materials:
        return self.streams.materials

    @property
    def pictures(self) -> PictureIds:
        return self.streams.scribe.pictures

    @cached_property
    def device(self) -> torch.device:
        return self.learner.final_norm.device

    def texts(self, talks: Sequence[Talk], sampling: Sampling = GREEDY) -> list[str]:
        """What the model says to each prompt, without special tokens."""
        found = generate(self.model, self._prompts(talks), sampling, eos_id=EOS_ID)
        return [self.scribe.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]

    def drawings(self, talks: Sequence[Talk], sampling: Sampling = GREEDY, num_frames: int = 1) -> Codes:
        """The pictures that the model answers each prompt with, as codes int64 [N, F, R, W]."""
        if not talks:
            return np.empty((0, num_frames, self.pictures.rows, self.pictures.columns), dtype=np.int64)
        found = generate(self.model, self._prompts(talks), sampling, eos_id=EOS_ID, num_frames=[num_frames] * len(talks))
        codes = [[token - self.pictures.first_code for token in ids if self.pictures.is_code(token)] for ids in found]
        return np.array(codes, dtype=np.int64).reshape(len(talks), num_frames, self.pictures.rows, self.pictures.columns)

    def free_replies(self, talks: Sequence[Talk], max_tokens: int) -> list[tuple[str, Codes]]:
        """What the model answers greedily when nothing is begun or ended for it: its words, and its whole pictures as codes [F, R, W]."""
        found = generate(self.model, self._prompts(talks), Sampling(max_tokens=max_tokens), eos_id=EOS_ID, num_frames=[FREE] * len(talks))
        pictures = self.pictures
        replies = []
        for ids in found:
            codes = [token - pictures.first_code for token in ids if pictures.is_code(token)]
            whole = len(codes) // pictures.num_places
            grids = np.array(codes[: whole * pictures.num_places], dtype=np.int64).reshape(whole, pictures.rows, pictures.columns)
            replies.append((self.scribe.tokenizer.decode(ids, skip_special_tokens=True).strip(), grids))
        return replies

    def pixels(self, codes: Codes) -> Pixels:
        """uint8 [..., S, S, 3] of codes [..., R, W]."""
        flat = decode(self.vq, codes.reshape(-1, *codes.shape[-2:]))
        return flat.reshape(*codes.shape[:-2], *flat.shape[1:])

    def nats(self, documents: Sequence[Document]) -> NDArray[np.float64]:
        """Of every target [M], teacher forced; in no order that means something."""
        return document_nats(self.learner, documents, self.pictures, PAD_ID).double().numpy()

    def nats_per_code(self, talks: Sequence[Talk]) -> float:
        """Mean nats of the codes in the answers, nothing else in them; 0 where there are none."""
        documents = self.scribe.write(talks)
        found = self.nats([replace(each, is_target=each.is_target & (each.ids >= self.pictures.first_code)) for each in documents])
        return float(found.mean()) if len(found) else 0.0

    def _prompts(self, talks: Sequence[Talk]) -> list[list[int]]:
        """All pictures of all prompts go through the image tokenizer in one call."""
        asked = [Talk(talk.kind, talk.prompt, ()) for talk in talks]
        return [each.ids[~each.is_target].tolist() for each in self.scribe.write(asked)]


def subject_of(learner: Transformer, vocabulary: tokenizers.Tokenizer, vq: VQTokenizer, materials: Materials, seed: int = 0) -> Subject:
    """A decoder that is being taught, as something to be measured; its weights are copied for the serving back end.

    Raises: WeightsError for a decoder without pictures.
    """
    if learner.config.pictures is None:
        raise WeightsError("a decoder without pictures can't be measured on pictures")
    device = learner.final_norm.device
    ops = select_ops("triton" if device.type == "cuda" else "cpu")
    source = NamedSource(named_tensors(learner))
    model = build_transformer(learner.config, source, ops, precision=Precision(torch.float32), device=device)
    scribe = Scribe(vocabulary, learner.config.pictures, materials.draw, partial(encode, vq))
    return Subject(model, learner, Streams(materials, scribe, vq), seed)


def open_subject(artefact: Path, materials: Materials, device: torch.device, seed: int = 0) -> Subject:
    """The model of an artefact's folder. Raises: WeightsError."""
    config = read_config(artefact)
    learner = teachable(config, open_weights(artefact, config), device)
    vocabulary = tokenizers.Tokenizer.from_file(str(artefact / "tokenizer.json"))
    return subject_of(learner, vocabulary, load_image_tokenizer(artefact, device), materials, seed)

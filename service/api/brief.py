"""From what a client wants drawn to an `Order`: prompts with and without the brief, sampling with the model's own defaults, what is kept.

No HTTP. Called by the picture and video routes.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.api.backend import Caller, sampling_number
from service.api.easel import Codes, Easel, Errand, Order
from service.api.images_schema import DrawFields
from service.api.strict import Warnings
from service.codec.prompt import Codec
from service.errors import RequestError
from service.scheduling.picture_grammar import PictureRule
from service.scheduling.sampling import SamplingParams
from service.vocabulary import PictureIds


@dataclass(frozen=True, slots=True)
class Brief:
    """text: what is wanted. pictures: codes of those that come before it. kept: of the picture to be drawn, as `PictureRule` has it.
    num_frames: pictures that are wanted of each choice."""

    text: str
    pictures: tuple[Codes, ...] = ()
    kept: Codes = ()
    num_frames: int = 1


def make_order(
    easel: Easel, model: str, brief: Brief, wanted: DrawFields, caller: Caller, warnings: Warnings, *, num_choices: int = 1
) -> Order:
    """Mutates: warnings. Raises: RequestError, ContextLengthError, UnavailableError."""
    codec, marks = easel.backend.codecs[model], easel.marks(model)
    guidance = sampling_number(wanted, codec, "guidance_scale", 1.0)
    if guidance == 1.0 and wanted.negative_prompt:
        warnings.note("negative_prompt", "negative_prompt has no effect while guidance_scale is 1")
    rule = PictureRule(brief.num_frames, kept=brief.kept)
    given = brief.kept[: rule.num_known]
    negative = wanted.negative_prompt or ""
    num_new = brief.num_frames * (marks.num_places + 1) - 1 - rule.num_known
    order = Order(
        model=model,
        prompt=(*_prompt(codec, marks, brief.text, brief.pictures), *given),
        unconditional=(*_prompt(codec, marks, negative, brief.pictures), *given) if guidance != 1.0 else (),
        rule=rule,
        sampling=_sampling(codec, wanted, num_new),
        errand=Errand.of(caller, wanted),
        num_choices=num_choices,
        guidance=guidance,
        draft_len=easel.backend.info(model).usual_draft_len if wanted.jacobi is None else wanted.jacobi,
    )
    easel.check_room(order)
    return order


def _prompt(codec: Codec, marks: PictureIds, text: str, pictures: Sequence[Codes]) -> Codes:
    """Ends with the beginning of the picture."""
    parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
    content: Any = parts if pictures else text
    return (*codec.encode_chat([{"role": "user", "content": content}], pictures=pictures), marks.begin_id)


def _sampling(codec: Codec, wanted: DrawFields, max_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=sampling_number(wanted, codec, "temperature", 1.0),
        top_k=max(int(sampling_number(wanted, codec, "top_k", 0)), 0),
        top_p=sampling_number(wanted, codec, "top_p", 1.0),
        min_p=sampling_number(wanted, codec, "min_p", 0.0),
        seed=secrets.randbits(62) if wanted.seed is None else wanted.seed,
    )


def kept_outside(codes: Codes, marks: PictureIds, mask: NDArray[np.bool_]) -> Codes:
    """What a masked redraw keeps: the codes of whose pixels none is to be redrawn. mask bool [rows, columns of pixels], any size: it is
    cut to the grid's shape around the centre, as the picture was.

    Raises: RequestError when that is all of them.
    """
    height, width = mask.shape
    side = min(Fraction(height, marks.rows), Fraction(width, marks.columns))  # of a code, in the mask's pixels
    top, left = (height - side * marks.rows) / 2, (width - side * marks.columns) / 2
    kept = []
    for place, code in enumerate(codes):
        row, column = divmod(place, marks.columns)
        rows = slice(math.floor(top + row * side), math.ceil(top + (row + 1) * side))
        columns = slice(math.floor(left + column * side), math.ceil(left + (column + 1) * side))
        kept.append(-1 if mask[rows, columns].any() else code)
    if min(kept) >= 0:
        raise RequestError("the mask has no transparent pixel, so nothing is to be redrawn", param="mask")
    return tuple(kept)


def kept_at_random(codes: Codes, strength: float) -> Codes:
    """What a variation keeps: all but a share `strength` of the codes; at least one is redrawn. Chosen by the picture and not by the seed,
    so that each of several can be drawn again by its own seed."""
    count = max(1, round(strength * len(codes)))
    redrawn = set(np.random.default_rng(codes).permutation(len(codes))[:count].tolist())
    return tuple(-1 if place in redrawn else code for place, code in enumerate(codes))

"""Better pictures for more work: redrawing what the model is least sure of, and choosing among several by the caption they suggest.

Both read the model's own likelihoods; neither touches how an id is drawn. Called by the picture routes.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import replace

from service.api.easel import Codes, Easel, Order
from service.api.together import together
from service.codec.prompt import Codec
from service.engine.messages import Generate
from service.engine.stream import error_of
from service.errors import UnavailableError
from service.scheduling.picture_grammar import PictureRule
from service.scheduling.reading import Read
from service.scheduling.sampling import SamplingParams

REDRAWN_SHARE = 0.25
"""Of a picture's codes in each round of `refined`."""
_NEXT_SEED = 1_000_003


def num_redrawn(num_open: int) -> int:
    """Codes that a round redraws, of so many that are not given."""
    return max(1, round(REDRAWN_SHARE * num_open))


async def read_logprobs(easel: Easel, order: Order, prompt: Sequence[int], first: int) -> list[float]:
    """Of each id of a prompt from position `first` on, given those before it. Raises: as the engine."""
    wanted = Generate(
        request_id=f"read-{uuid.uuid4().hex}",
        model=order.model,
        prompt=list(prompt),
        sampling=SamplingParams(max_tokens=0),
        priority=order.errand.priority,
        timeout_s=order.errand.left_s,
        tenant=order.errand.tenant,
        read=Read(first=first),
    )
    stream = easel.backend.start_counted(wanted, order.errand.arrival, is_part=True)
    found: list[float] = []
    async for event in stream:
        if (error := error_of(event)) is not None:
            raise error
        if event.reading is not None:
            found = [each.logprob for each in event.reading.logprobs]
    if len(found) != len(prompt) - first:
        raise UnavailableError("The request was aborted.")
    return found


async def refined(easel: Easel, order: Order, codes: Codes, seed: int, rounds: int) -> tuple[Codes, list[float]]:
    """The picture after so many rounds of redrawing its least likely codes among those that the order leaves open, and the log-likelihood
    of the whole picture before the first round and after each: it never falls, because what does not raise it is thrown away.

    Source: Chang et al. 2022 (MaskGIT), section 3.2, for what is masked; here what is kept is given, and the rest drawn in order.
    """
    first = len(order.prompt) - order.rule.num_known
    open_places = [place for place in range(len(codes)) if not order.rule.kept or order.rule.kept[place] < 0]
    logprobs = await read_logprobs(easel, order, (*order.prompt[:first], *codes), first)
    scores = [math.fsum(logprobs)]
    count = num_redrawn(len(open_places))
    for number in range(rounds):
        redrawn = set(sorted(open_places, key=lambda place: logprobs[place])[:count])
        rule = PictureRule(1, kept=tuple(-1 if place in redrawn else code for place, code in enumerate(codes)))
        sampling = replace(order.sampling, seed=(seed + (number + 1) * _NEXT_SEED) % 2**62, max_tokens=len(codes) - rule.num_known)
        again = replace(
            order,
            prompt=(*order.prompt[:first], *codes[: rule.num_known]),
            unconditional=(*_bare(order.unconditional, order), *codes[: rule.num_known]) if order.unconditional else (),
            rule=rule,
            sampling=sampling,
            num_choices=1,
        )
        (painting,) = await easel.paintings(again, is_part=True)
        drawn = painting.frames[0]
        news = await read_logprobs(easel, order, (*order.prompt[:first], *drawn), first)
        if math.fsum(news) > scores[-1]:
            codes, logprobs = drawn, news
        scores.append(math.fsum(logprobs))
    return codes, scores


def _bare(prompt: Codes, order: Order) -> Codes:
    """Without the codes that are given."""
    return prompt[: len(prompt) - order.rule.num_known]


async def caption_score(easel: Easel, codec: Codec, order: Order, codes: Codes, caption: str) -> float:
    """The mean log-likelihood of the caption's ids as an answer about the picture, by the question under which it is greatest."""
    scores = await together(_caption_score(easel, codec, order, codes, caption, each) for each in codec.caption_questions)
    return max(scores)


async def _caption_score(easel: Easel, codec: Codec, order: Order, codes: Codes, caption: str, question: str) -> float:
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    asked = codec.encode_chat([{"role": "user", "content": parts}], pictures=[codes])
    ids = codec.tokenizer.encode(caption)
    if not ids:
        return 0.0
    logprobs = await read_logprobs(easel, order, (*asked, *ids), len(asked))
    return math.fsum(logprobs) / len(logprobs)

"""What the loop looks at once more before it trusts it: requests, and what a runner gives back.

Pure questions: nothing is changed and nothing sent. Called by `engine` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from service.engine.messages import MAX_CHOICES, MAX_DRAFT_LEN, MAX_GUIDANCE, Generate, ModelInfo, Picture
from service.errors import RequestError
from service.scheduling.plan import Drawn, PromptReading, StepPlan
from service.scheduling.reading import Read

# Of one request and of one delivery: 16 bytes each at most, far below the longest message.
MAX_READ_LOGPROBS = 2_000_000


def check_request(wanted: Generate, info: ModelInfo) -> None:
    """What would poison a kernel or the books, looked at once more. Raises: RequestError."""
    if not 1 <= wanted.num_choices <= MAX_CHOICES:
        raise RequestError(f"the number of choices must be between 1 and {MAX_CHOICES}", param="n")
    if not wanted.prompt:
        raise RequestError("the prompt is empty", param="prompt")
    ids = (*wanted.prompt, *wanted.unconditional)
    if not (min(ids) >= 0 and max(ids) < info.vocab_size):
        raise RequestError(f"the prompt holds a token id that is not in the vocabulary of {info.vocab_size}", param="prompt")
    if not (math.isfinite(wanted.timeout_s) and wanted.timeout_s >= 0):
        raise RequestError("timeout must be a number of seconds", param="timeout")
    if wanted.sampling.seed + wanted.num_choices > 2**63:
        # Choice i draws with seed + i, which must stay a 64-bit number.
        raise RequestError("seed + n must be at most 2**63", param="seed")
    if wanted.read is not None:
        check_read(wanted.read, len(wanted.prompt))
    check_pictures(wanted, info)
    if not info.can_generate and (wanted.read is None or wanted.read.first or wanted.sampling.max_tokens):
        raise RequestError(f"the model {info.name} makes embeddings and no text", param="model")
    try:
        wanted.sampling.check(info.vocab_size, 0 if wanted.read is not None else 1)
    except ValueError as error:
        raise RequestError(str(error)) from None


def check_pictures(wanted: Generate, info: ModelInfo) -> None:
    """What is asked of a model's pictures. Raises: RequestError."""
    if not (math.isfinite(wanted.guidance) and 0 <= wanted.guidance <= MAX_GUIDANCE):
        raise RequestError(f"guidance_scale must be between 0 and {MAX_GUIDANCE}", param="guidance_scale")
    if not 0 <= wanted.draft_len <= MAX_DRAFT_LEN:
        raise RequestError(f"at most {MAX_DRAFT_LEN} ids can be guessed ahead")
    if wanted.pictures is None:
        return
    if info.pictures is None:
        raise RequestError(f"the model {info.name} has no pictures", param="model")
    if wanted.grammar:
        raise RequestError("an answer that follows a grammar has no pictures")
    try:
        wanted.pictures.check(info.pictures)
    except ValueError as error:
        raise RequestError(str(error)) from None


def check_picture(wanted: Picture, info: ModelInfo) -> None:
    """Raises: RequestError."""
    pictures = info.pictures
    if pictures is None or not info.picture_pixels:
        raise RequestError(f"the model {info.name} can't read or draw pictures", param="model")
    if bool(wanted.pixels) == bool(wanted.codes):
        raise RequestError("a picture is given as pixels or as codes")
    height, width = info.picture_size
    if wanted.pixels and len(wanted.pixels) != 3 * height * width:
        raise RequestError(f"a picture has {3 * height * width} bytes, not {len(wanted.pixels)}")
    if wanted.codes and (len(wanted.codes) != pictures.num_places or not all(map(pictures.is_code, wanted.codes))):
        raise RequestError(f"a picture has {pictures.num_places} codes")
    if not (math.isfinite(wanted.timeout_s) and wanted.timeout_s >= 0):
        raise RequestError("timeout must be a number of seconds", param="timeout")


def check_read(read: Read, prompt_len: int) -> None:
    """Raises: RequestError."""
    try:
        read.check(prompt_len)
    except ValueError as error:
        raise RequestError(str(error)) from None
    num_targets = prompt_len - read.first if read.first else 0
    if num_targets * (1 + read.num_top) > MAX_READ_LOGPROBS:
        raise RequestError(
            f"log-probabilities of {num_targets} tokens with {read.num_top} alternatives each are too many; ask for at most "
            f"{MAX_READ_LOGPROBS} numbers at once"
        )


def check_drawn(plan: StepPlan, drawn: Sequence[Drawn], vocab_size: int) -> None:
    """Raises: RuntimeError when a runner's answer does not fit its plan."""
    if len(drawn) != len(plan.samples):
        raise RuntimeError(f"{len(plan.samples)} ids were to be drawn and {len(drawn)} came")
    if any(not 0 <= one.token < vocab_size for one in drawn):
        raise RuntimeError("an id outside of the vocabulary was drawn")


def check_readings(plan: StepPlan, readings: Sequence[PromptReading]) -> None:
    """Raises: RuntimeError when a runner's answer does not fit its plan."""
    if len(readings) != len(plan.reads):
        raise RuntimeError(f"{len(plan.reads)} prompts were to be read and {len(readings)} readings came")
    for read, reading in zip(plan.reads, readings, strict=True):
        if len(reading.logprobs) != len(read.targets):
            raise RuntimeError(f"{len(read.targets)} log-probabilities were to be read and {len(reading.logprobs)} came")
        if (reading.vector is not None) != (read.is_last and read.pool != ""):
            raise RuntimeError("a vector is missing, or came unasked")

"""POST /v1/classify: which of the request's own labels fits a text, with nothing trained for it.

A model that makes text tells how likely each label is as its answer; an encoder tells whose vector is nearest. No tokens are drawn.
docs/embeddings.md says what the numbers mean.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from service.api.backend import Backend, Caller, context_of
from service.api.body import BodyLimits, parse
from service.api.embeddings import reply
from service.api.readings import read_prompts, while_connected
from service.api.routes import caller_of
from service.api.schema_vectors import DEFAULT_INSTRUCTION, DEFAULT_TEMPLATE, ClassifyRequest
from service.api.strict import Warnings
from service.api.vectors import cosines, embed
from service.codec.prompt import Codec
from service.errors import ContextLengthError, RequestError
from service.scheduling.reading import Read

_LEAST = float(np.finfo(np.float32).min)
COSINE_SCALE = 20.0
"""Cosines times this go into the softmax: the scale that sentence-transformers trains its models with."""


@dataclass(frozen=True, slots=True)
class Scored:
    """scores float64 [N, L]: of each text's labels, the higher the better; logits: what goes into the softmax."""

    scores: NDArray[np.float64]
    logits: NDArray[np.float64]
    prompt_tokens: int
    cached_tokens: int


def classify_router(backend: Backend, limits: BodyLimits) -> APIRouter:
    """Raises, when called: RequestError and its kinds, OverloadedError, UnavailableError, DeadlineError, EngineError."""
    router = APIRouter(redirect_slashes=False)

    @router.post("/v1/classify")
    async def create_classification(request: Request) -> Response:
        wanted, warnings = await parse(request, ClassifyRequest, limits)
        return reply(await while_connected(request, classify(backend, wanted, caller_of(request), warnings)), warnings)

    return router


async def classify(backend: Backend, wanted: ClassifyRequest, caller: Caller, warnings: Warnings) -> dict[str, Any]:
    """The answer's body. Mutates: warnings."""
    model = backend.choose(wanted.model)
    classify_id = f"classify-{uuid.uuid4().hex}"
    score = _by_likelihood if backend.info(model).can_generate else _by_cosine
    found = await score(backend, model, wanted, caller, classify_id, warnings)
    probs = _softmax(found.logits)
    data = [
        {
            "index": index,
            "label": wanted.labels[int(row.argmax())],
            "probs": row.tolist(),
            "num_classes": len(wanted.labels),
            "scores": scores.tolist(),
        }
        for index, (row, scores) in enumerate(zip(probs, found.scores, strict=True))
    ]
    usage = {
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": 0,
        "total_tokens": found.prompt_tokens,
        "prompt_tokens_details": {"cached_tokens": found.cached_tokens},
    }
    return {
        "id": classify_id,
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "labels": wanted.labels,
        "data": data,
        "usage": usage,
    }


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row. A row without a likely label (all minus infinity) gives every label the same."""
    best = logits.max(axis=1, keepdims=True)
    weights = np.exp(logits - np.where(np.isfinite(best), best, 0))
    total = weights.sum(axis=1, keepdims=True)
    shares: NDArray[np.float64] = np.where(total > 0, weights / np.where(total > 0, total, 1), 1 / logits.shape[1])
    return shares


# --- by an encoder ----------------------------------------------------------------------------------------------------------------


async def _by_cosine(backend: Backend, model: str, wanted: ClassifyRequest, caller: Caller, request_id: str, warnings: Warnings) -> Scored:
    """The cosines of each text's vector with those of the labels. Raises: RequestError for what only a model that makes text can do."""
    for name, is_given in (
        ("messages", wanted.messages is not None),
        ("instruction", wanted.instruction is not None),
        ("normalize", wanted.normalize != "none"),
    ):
        if is_given:
            raise RequestError(f"{name} is for models that make text; {model} makes vectors", param=name)
    texts = [_filled(wanted.template or DEFAULT_TEMPLATE, input=text) for text in wanted.input or ()]
    num_texts, is_single = len(texts), len(texts) == 1

    def where(index: int) -> str:
        if index >= num_texts:
            return f"labels[{index - num_texts}]"
        return "input" if is_single else f"input[{index}]"

    found = await embed(backend, model, [*texts, *wanted.labels], wanted, caller, request_id, where=where, warnings=warnings)
    labels = found.rows[num_texts:]
    scores = np.stack([cosines(text[None], labels) for text in found.rows[:num_texts]])
    return Scored(scores, scores * COSINE_SCALE, found.prompt_tokens, found.cached_tokens)


# --- by a model that makes text ---------------------------------------------------------------------------------------------------


async def _by_likelihood(
    backend: Backend, model: str, wanted: ClassifyRequest, caller: Caller, request_id: str, warnings: Warnings
) -> Scored:
    """The log-probability of each label as the answer. All labels of a text share its prompt, which is computed once."""
    if wanted.truncate_prompt_tokens is not None:
        message = "truncate_prompt_tokens is for encoders; a prompt that is cut would lose its question"
        raise RequestError(message, param="truncate_prompt_tokens")
    texts: list[str | None] = [None] if wanted.input is None else [*wanted.input]
    if wanted.normalize == "prior":
        texts.append("")
    codec = backend.codecs[model]
    num_chars = sum(len(text or "") for text in texts) + sum(_num_chars(message) for message in _messages(wanted))
    prompts, endings = await backend.encode(
        model, lambda: ([_prompt(codec, wanted, text) for text in texts], [_ending(codec, label) for label in wanted.labels]), num_chars
    )
    _check_lengths(backend, model, wanted, prompts, endings)
    found = await read_prompts(
        backend,
        model,
        [[*prompt, *ending] for prompt in prompts for ending in endings],
        [Read(first=len(prompt)) for prompt in prompts for _ in endings],
        caller,
        request_id,
        param="messages" if wanted.input is None else "input",
        priority=wanted.priority,
        timeout_s=wanted.timeout or 0.0,
        cache_salt=wanted.cache_salt,
    )
    sums = np.array([sum(each.logprob for each in reading.logprobs) for reading in found.readings]).reshape(len(prompts), len(endings))
    logits = _normalized(sums, wanted.normalize, np.array([len(ending) for ending in endings]))
    # JSON has no infinity: an impossible label has the least number that a float32 holds.
    return Scored(np.maximum(logits, _LEAST), logits, found.prompt_tokens, found.cached_tokens)


def _normalized(sums: NDArray[np.float64], how: str, lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """sums: of each label's log-probabilities, with "prior" the empty text's as the last row. Minus infinity stays."""
    if how == "length":
        return sums / lengths
    if how == "none":
        return sums
    texts, prior = sums[:-1], sums[-1]
    return texts - np.where(np.isfinite(prior), prior, 0)


def _messages(wanted: ClassifyRequest) -> list[dict[str, Any]]:
    return [message.as_template_input() for message in wanted.messages or ()]


def _num_chars(message: dict[str, Any]) -> int:
    content = message.get("content", "")
    return len(content) if isinstance(content, str) else sum(len(part.get("text", "")) for part in content)


def _prompt(codec: Codec, wanted: ClassifyRequest, text: str | None) -> list[int]:
    """Up to where the answer begins. text None: the request's messages stand for it. Raises: RequestError."""
    instruction = _filled(wanted.instruction if wanted.instruction is not None else DEFAULT_INSTRUCTION, labels=", ".join(wanted.labels))
    if text is None:
        messages = _messages(wanted)
        has_own = wanted.instruction is None and messages[0]["role"] in ("system", "developer")
        return codec.encode_chat(messages if has_own or not instruction else [_said("system", instruction), *messages])
    filled = _filled(wanted.template or DEFAULT_TEMPLATE, input=text)
    if codec.template is None:
        ids = codec.encode_document("\n\n".join(part for part in (instruction, filled, "Label:") if part))
        return ids[:-1] if ids[-1] == codec.tokenizer.ends.closing_id else ids
    return codec.encode_chat([*([_said("system", instruction)] if instruction else []), _said("user", filled)])


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _ending(codec: Codec, label: str) -> list[int]:
    """A label as the answer's ids. In a chat with the end of the answer, without which a label that begins another one would be at
    least as likely as that."""
    if codec.template is None:
        return codec.tokenizer.encode(f" {label}")
    return [*codec.tokenizer.encode(label), *codec.eos_ids[:1]]


def _filled(template: str, **values: str) -> str:
    """The template with the named places filled in one go: braces in a value, and other braces, are left alone."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda match: values[match[0][1:-1]], template)


def _check_lengths(
    backend: Backend, model: str, wanted: ClassifyRequest, prompts: Sequence[list[int]], endings: Sequence[list[int]]
) -> None:
    """Raises: RequestError for a label without a token; ContextLengthError."""
    for index, ending in enumerate(endings):
        if not ending:
            raise RequestError(f"labels[{index}] has no token", param=f"labels[{index}]")
    context, longest = context_of(backend.info(model)), max(map(len, endings))
    for index, prompt in enumerate(prompts):
        if len(prompt) + longest > context:
            param = "messages" if wanted.input is None else "input" if len(prompts) == 1 else f"input[{index}]"
            raise ContextLengthError(
                f"This model's maximum context length is {context} tokens. However, {param} makes a prompt of {len(prompt)} tokens, and "
                f"the longest label has {longest}. Please reduce its length.",
                param=param,
            )

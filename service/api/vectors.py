"""Texts into vectors of length one: the model that makes them, encoding, truncation, pooling. Embeddings, rerank, score and classify.

Knows no HTTP and no JSON. The prompts are read by `readings`, as all that is read and not continued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.api.backend import Backend, Caller, context_of
from service.api.readings import read_prompts
from service.api.schema_vectors import ReadingFields
from service.api.strict import Warnings
from service.codec.prompt import Codec
from service.errors import ContextLengthError, EngineError, RequestError
from service.scheduling.reading import Pool, Read

Where = Callable[[int], str]
"""The field that the text at an index stands in, as `documents[3]`."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """rows float32 [N, D], each of length one. prompt_tokens: of all texts; cached_tokens: of them, found in the prefix cache."""

    rows: NDArray[np.float32]
    prompt_tokens: int
    cached_tokens: int


def choose_embedder(backend: Backend, name: str | None) -> str:
    """The model's name; without one the first encoder, or else the first model. Raises: ModelNotFoundError, UnavailableError."""
    if name is None:
        infos = backend.engine.models()
        name = next((each for each in backend.codecs if each in infos and not infos[each].can_generate), None)
    return backend.choose(name)


async def embed(
    backend: Backend,
    model: str,
    texts: Sequence[str | list[int]],
    wanted: ReadingFields,
    caller: Caller,
    request_id: str,
    *,
    where: Where,
    warnings: Warnings,
    pooling: Pool | None = None,
    dimensions: int | None = None,
) -> Vectors:
    """Vectors in the texts' order; dimensions: how many of their first numbers to keep.

    Mutates: warnings, about texts that were cut. Raises: RequestError, ContextLengthError, and what `read_prompts` raises.
    """
    info = backend.info(model)
    if dimensions is not None and dimensions > info.vector_width:
        raise RequestError(f"dimensions must be at most {info.vector_width}, the width of {model}", param="dimensions")
    prompts = await encode_texts(backend, model, texts, where)
    prompts = fit(backend, model, prompts, wanted.truncate_prompt_tokens, where, warnings)
    found = await read_prompts(
        backend,
        model,
        prompts,
        Read(pool=pooling or info.pool),
        caller,
        request_id,
        priority=wanted.priority,
        timeout_s=wanted.timeout or 0.0,
        cache_salt=wanted.cache_salt,
    )
    rows = _rows([reading.vector for reading in found.readings], info.vector_width)
    return Vectors(unit_rows(rows[:, :dimensions]), found.prompt_tokens, found.cached_tokens)


async def encode_texts(backend: Backend, model: str, texts: Sequence[str | list[int]], where: Where) -> list[list[int]]:
    """Ids of texts; lists of ids are checked and stay. Raises: RequestError, OverloadedError."""
    codec, vocab_size = backend.codecs[model], min(backend.codecs[model].vocab_size, backend.info(model).vocab_size)
    return await backend.encode(
        model, lambda: [_ids(codec, vocab_size, text, where(index)) for index, text in enumerate(texts)], sum(map(len, texts))
    )


def _ids(codec: Codec, vocab_size: int, text: str | list[int], param: str) -> list[int]:
    if isinstance(text, str):
        ids = codec.encode_document(text)
        if not ids:
            raise RequestError(f"{param} has no token", param=param)
        return ids
    if max(text) >= vocab_size:
        raise RequestError(f"{param} has the id {max(text)}; the vocabulary has ids 0 to {vocab_size - 1}", param=param)
    return text


def fit(backend: Backend, model: str, prompts: Sequence[list[int]], limit: int | None, where: Where, warnings: Warnings) -> list[list[int]]:
    """The prompts, cut to `limit` tokens where there is one (-1: the model's context), the id that closes them kept.

    Mutates: warnings. Raises: ContextLengthError for one that is too long without it; RequestError for a limit that is too high.
    """
    context = context_of(backend.info(model))
    if limit is not None and limit > context:
        raise RequestError(
            f"truncate_prompt_tokens must be at most {context}, which the model takes, or -1 for that", param="truncate_prompt_tokens"
        )
    most = context if limit in (None, -1) else limit
    return [
        prompt if len(prompt) <= most else _cut(backend, model, prompt, limit, most, where(index), warnings)
        for index, prompt in enumerate(prompts)
    ]


def _cut(backend: Backend, model: str, prompt: list[int], limit: int | None, most: int, param: str, warnings: Warnings) -> list[int]:
    if limit is None:
        raise ContextLengthError(
            f"This model's maximum context length is {most} tokens. However, {param} has {len(prompt)} tokens. Please reduce its length, "
            "or let truncate_prompt_tokens cut it.",
            param=param,
        )
    warnings.note(param, f"{param} was cut from {len(prompt)} to {most} tokens")
    closing = backend.codecs[model].tokenizer.ends.closing_id
    if closing is not None and prompt[-1] == closing:
        return [*prompt[: most - 1], closing]
    return prompt[:most]


def _rows(vectors: Sequence[bytes | None], width: int) -> NDArray[np.float32]:
    """Raises: EngineError for a vector that is missing, or of another width."""
    data = b"".join(vector or b"" for vector in vectors)
    if len(data) != 4 * width * len(vectors):
        raise EngineError("the engine gave no vector of a text")
    return np.frombuffer(data, dtype="<f4").reshape(len(vectors), width)


def unit_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row divided by its length; a row of zeros stays. Raises: EngineError for numbers that are none."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        raise EngineError("the model gave a vector with numbers that are none")
    unit: NDArray[np.float32] = (rows / np.where(lengths > 0, lengths, 1)).astype("<f4")
    return unit


def cosines(lefts: NDArray[np.float32], rights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of each row of rights with the only row of lefts, or with its own, both of length one. A pair's number does not depend on the
    others, as that of a matrix product might."""
    found: NDArray[np.float64] = (lefts.astype(np.float64) * rights).sum(axis=1)
    return found

"""POST /v1/rerank, /rerank, /v2/rerank, /v1/score, /score: how near texts are to each other, by the cosine of their vectors.

No pooling and no tokens: those are in `vectors`.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.api.backend import Backend, Caller
from service.api.body import BodyLimits, parse
from service.api.embeddings import reply, usage
from service.api.readings import while_connected
from service.api.routes import caller_of
from service.api.schema_vectors import RerankRequest, ScoreRequest
from service.api.strict import Warnings
from service.api.vectors import Vectors, choose_embedder, cosines, embed


def rerank_router(backend: Backend, limits: BodyLimits) -> APIRouter:
    """Raises, when called: RequestError and its kinds, OverloadedError, UnavailableError, DeadlineError, EngineError."""
    router = APIRouter(redirect_slashes=False)

    @router.post("/v1/rerank")
    @router.post("/rerank")
    async def create_rerank(request: Request) -> Response:
        """As Jina's and Cohere's first version: the documents come back unless they are not wanted."""
        wanted, warnings = await parse(request, RerankRequest, limits)
        model, ranking, found = await while_connected(request, rank(backend, wanted, caller_of(request), warnings))
        results = _results(wanted, ranking, wanted.return_documents is not False)
        body = {"id": f"rerank-{uuid.uuid4().hex}", "object": "list", "model": model, "results": results, "usage": usage(found)}
        return reply(body, warnings)

    @router.post("/v2/rerank")
    async def create_rerank_v2(request: Request) -> Response:
        """As Cohere's second version: no model, and the counts in `meta`."""
        wanted, warnings = await parse(request, RerankRequest, limits)
        _, ranking, found = await while_connected(request, rank(backend, wanted, caller_of(request), warnings))
        meta = {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": found.prompt_tokens, "output_tokens": 0},
        }
        body = {"id": str(uuid.uuid4()), "results": _results(wanted, ranking, wanted.return_documents is True), "meta": meta}
        return reply(body, warnings)

    @router.post("/v1/score")
    @router.post("/score")
    async def create_score(request: Request) -> Response:
        wanted, warnings = await parse(request, ScoreRequest, limits)
        return reply(await while_connected(request, score(backend, wanted, caller_of(request), warnings)), warnings)

    return router


async def rank(backend: Backend, wanted: RerankRequest, caller: Caller, warnings: Warnings) -> tuple[str, list[tuple[int, float]], Vectors]:
    """The model, (document's index, score) of the best top_n, best first and equal ones in their order, and the vectors.

    Mutates: warnings.
    """
    model = choose_embedder(backend, wanted.model)
    if wanted.max_tokens_per_doc is not None:
        wanted = wanted.model_copy(update={"truncate_prompt_tokens": _least(wanted, backend.info(model).max_context)})
    texts = [wanted.query, *(document.text for document in wanted.documents)]

    def where(index: int) -> str:
        return f"documents[{index - 1}]" if index else "query"

    request_id = f"rerank-{uuid.uuid4().hex}"
    found = await embed(backend, model, texts, wanted, caller, request_id, where=where, warnings=warnings, pooling=wanted.pooling)
    scores = cosines(found.rows[:1], found.rows[1:])
    order = np.argsort(-scores, kind="stable")[: wanted.top_n]
    return model, [(int(index), float(scores[index])) for index in order], found


def _least(wanted: RerankRequest, context: int) -> int:
    """Cohere's bound of a document's tokens, and ours of every text's: the lower one."""
    own = wanted.truncate_prompt_tokens
    return min(limit for limit in (wanted.max_tokens_per_doc, own if own != -1 else None, context) if limit is not None)


def _results(wanted: RerankRequest, ranking: list[tuple[int, float]], with_documents: bool) -> list[dict[str, Any]]:
    return [
        {
            "index": index,
            **({"document": {"text": wanted.documents[index].text}} if with_documents else {}),
            "relevance_score": score,
        }
        for index, score in ranking
    ]


async def score(backend: Backend, wanted: ScoreRequest, caller: Caller, warnings: Warnings) -> dict[str, Any]:
    """The answer's body: a score for each text of the right side, with the one on the left or with its own. Mutates: warnings."""
    model = choose_embedder(backend, wanted.model)
    (left, lefts), (right, rights) = wanted.sides

    def where(index: int) -> str:
        return f"{left}[{index}]" if index < len(lefts) else f"{right}[{index - len(lefts)}]"

    score_id = f"score-{uuid.uuid4().hex}"
    found = await embed(backend, model, [*lefts, *rights], wanted, caller, score_id, where=where, warnings=warnings, pooling=wanted.pooling)
    scores = cosines(found.rows[: len(lefts)], found.rows[len(lefts) :])
    data = [{"object": "score", "index": index, "score": float(each)} for index, each in enumerate(scores)]
    return {"id": score_id, "object": "list", "created": int(time.time()), "model": model, "data": data, "usage": usage(found)}

"""GET /v1/models and /v1/models/{id}: which models there are, how long their contexts, and what each can do.

One form for OpenAI's clients, vLLM's, llama-server's and Anthropic's: each reads its own keys.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from service.api.backend import Backend, context_of
from service.errors import ModelNotFoundError


def models_router(backend: Backend) -> APIRouter:
    """Raises, when called: ModelNotFoundError."""
    router = APIRouter(redirect_slashes=False)
    created = int(time.time())

    @router.get("/v1/models")
    async def list_models() -> Response:
        data = [model_view(backend, name, created) for name in backend.codecs]
        return JSONResponse({"object": "list", "data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]})

    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str) -> Response:
        if model_id not in backend.codecs:
            raise ModelNotFoundError(f"The model `{model_id}` does not exist or you do not have access to it.", param="model")
        return JSONResponse(model_view(backend, model_id, created))

    return router


def model_view(backend: Backend, name: str, created: int) -> dict[str, Any]:
    """max_model_len and meta are what vLLM's and llama-server's clients read, type to created_at what Anthropic's do; sizes are known
    once the model is loaded."""
    codec = backend.codecs[name]
    info = backend.engine.models().get(name)
    meta: dict[str, Any] = {"n_ctx_train": codec.max_context, "n_vocab": codec.vocab_size}
    if info is not None:
        meta |= {"dtype": info.dtype, "weight_bytes": info.weight_bytes, "kv_tokens": info.kv_tokens, "n_embd": info.vector_width}
    meta["capabilities"] = capabilities(backend, name)
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "braid",
        "max_model_len": context_of(info) if info is not None else codec.max_context,
        "modalities": _modalities(meta["capabilities"]),
        "meta": meta,
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "lifecycle": "active",
    }


def capabilities(backend: Backend, name: str) -> dict[str, bool]:
    """Which routes make sense for the model."""
    codec = backend.codecs[name]
    info = backend.engine.models().get(name)
    makes_text = info.can_generate if info is not None else codec.tokenizer.ends.closing_id is None
    can_chat = makes_text and codec.template is not None
    has_pictures = info is not None and info.picture_pixels > 0
    return {
        "chat": can_chat,
        "completion": makes_text,
        "embedding": info is None or info.vector_width > 0,
        "tools": can_chat,
        "structured_output": makes_text,
        "vision": has_pictures and can_chat,
        "image_generation": has_pictures,
    }


def _modalities(capabilities: dict[str, bool]) -> dict[str, list[str]]:
    pictures = ["image"] if capabilities["image_generation"] else []
    return {"input": ["text", *pictures], "output": ["text" if capabilities["completion"] else "embedding", *pictures]}

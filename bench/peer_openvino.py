"""OpenVINO GenAI behind HTTP, for `bench.peers`: its continuous batching under the thinnest streaming endpoint that can be written.

GenAI is a library without a server. Runs in the peer's own environment and imports nothing of Braid's. One thread steps the pipeline;
tokens reach their requests once a step, in one call. Text is decoded by the tokenizers library, piece by piece.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openvino_genai
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

BLOCK_TOKENS = 32  # of a block of its K/V cache on a CPU


@dataclass(eq=False)
class Waiting:
    """A request: its prompt, and the queue that gets lists of new ids, then None."""

    prompt: str
    config: openvino_genai.GenerationConfig
    ids: asyncio.Queue[list[int] | None] = field(default_factory=asyncio.Queue)
    handle: Any = None
    is_left: bool = False


class Engine:
    """The pipeline, and the thread that steps it while there is something to do."""

    def __init__(self, folder: Path, cache_tokens: int, batch_tokens: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = -(-cache_tokens // BLOCK_TOKENS)
        if batch_tokens:
            scheduler.max_num_batched_tokens = batch_tokens
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU")
        self.template = self.pipeline.get_tokenizer()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.condition = threading.Condition()
        self.new: list[Waiting] = []
        self.numbers = itertools.count()
        self.loop: asyncio.AbstractEventLoop | None = None

    def add(self, request: Waiting) -> None:
        with self.condition:
            self.new.append(request)
            self.condition.notify()

    def run(self) -> None:
        """Steps for ever. A request whose client has gone is stopped."""
        running: list[Waiting] = []
        while True:
            with self.condition:
                while not (running or self.new):
                    self.condition.wait()
                new, self.new = self.new, []
            for request in new:
                request.handle = self.pipeline.add_request(next(self.numbers), request.prompt, request.config)
            running += new
            self.pipeline.step()
            told: list[tuple[Waiting, list[int] | None]] = []
            for request in list(running):
                while request.handle.can_read():
                    for output in request.handle.read().values():
                        told.append((request, list(output.generated_ids)))
                if request.is_left:
                    request.handle.stop()
                if request.is_left or request.handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                    running.remove(request)
                    told.append((request, None))
            if told and self.loop is not None:
                self.loop.call_soon_threadsafe(deliver, told)


def deliver(told: list[tuple[Waiting, list[int] | None]]) -> None:
    for request, ids in told:
        request.ids.put_nowait(ids)


class Endpoint:
    """Chat and plain completions, streamed or whole; as many fields as a load generator sends."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine = engine
        self.model = model

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        is_chat = request.url.path.endswith("/chat/completions")
        if is_chat:
            prompt = self.engine.template.apply_chat_template(body["messages"], add_generation_prompt=True)
        else:
            prompt = body["prompt"]
        waiting = Waiting(prompt, self.sampling(body))
        self.engine.loop = asyncio.get_running_loop()
        if body.get("stream"):
            return StreamingResponse(self.stream(waiting, is_chat), media_type="text/event-stream")
        self.engine.add(waiting)
        ids: list[int] = []
        while (more := await waiting.ids.get()) is not None:
            ids += more
        text = self.engine.tokenizer.decode(ids)
        choice = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        return JSONResponse(
            {**self.head(is_chat), "choices": [{"index": 0, "finish_reason": "length", **choice}], "usage": self.usage(prompt, ids)}
        )

    async def stream(self, waiting: Waiting, is_chat: bool) -> AsyncIterator[str]:
        head = self.head(is_chat)
        decoder = DecodeStream(skip_special_tokens=True)
        ids: list[int] = []
        self.engine.add(waiting)
        try:
            while (more := await waiting.ids.get()) is not None:
                ids += more
                pieces = [decoder.step(self.engine.tokenizer, each) for each in more]
                if text := "".join(piece for piece in pieces if piece):
                    choice = {"delta": {"content": text}} if is_chat else {"text": text}
                    yield event({**head, "choices": [{"index": 0, "finish_reason": None, **choice}]})
            last = {"delta": {}} if is_chat else {"text": ""}
            yield event({**head, "choices": [{"index": 0, "finish_reason": "length", **last}]})
            yield event({**head, "choices": [], "usage": self.usage(waiting.prompt, ids)})
            yield "data: [DONE]\n\n"
        finally:
            waiting.is_left = True

    def sampling(self, body: dict[str, Any]) -> openvino_genai.GenerationConfig:
        """Greedy only: the comparison is."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = body.get("max_completion_tokens") or body.get("max_tokens") or 128
        config.ignore_eos = bool(body.get("ignore_eos"))
        config.eos_token_id = self.engine.pipeline.get_config().eos_token_id
        config.do_sample = False
        return config

    def head(self, is_chat: bool) -> dict[str, Any]:
        return {
            "id": "openvino",
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": self.model,
        }

    def usage(self, prompt: str, ids: list[int]) -> dict[str, int]:
        count = len(self.engine.tokenizer.encode(prompt, add_special_tokens=False).ids)
        return {"prompt_tokens": count, "completion_tokens": len(ids), "total_tokens": count + len(ids)}

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self.model, "object": "model", "created": 0, "owned_by": "openvino"}]})

    async def health(self, _: Request) -> Response:
        return JSONResponse({})


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True, help="What the model is called.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cache-tokens", type=int, default=65_536, help="Room of the K/V cache.")
    parser.add_argument("--batch-tokens", type=int, default=0, help="Most tokens of a step; 0 is the library's own choice.")
    given = parser.parse_args()
    engine = Engine(given.folder, given.cache_tokens, given.batch_tokens)
    threading.Thread(target=engine.run, daemon=True).start()
    endpoint = Endpoint(engine, given.model)
    routes = [
        Route("/v1/chat/completions", endpoint.answer, methods=["POST"]),
        Route("/v1/completions", endpoint.answer, methods=["POST"]),
        Route("/v1/models", endpoint.models),
        Route("/health", endpoint.health),
    ]
    uvicorn.run(Starlette(routes=routes), host="127.0.0.1", port=given.port, log_level="warning")


if __name__ == "__main__":
    main()

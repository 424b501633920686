"""A server with a data folder: files and batches with everything but the engine real. Restarts and sudden deaths included."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from starlette.responses import Response

from service.api.insider import SelfCaller
from service.jobs.desk import Desk, open_desk
from tests.api.fakes import MODEL, Running, running

LIMITS: dict[str, Any] = {"max_file_bytes": 100_000, "max_total_bytes": 400_000, "concurrency": 4}


@dataclass
class Office:
    server: Running
    desk: Desk
    key: str

    def client(self, key: str = "") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=key or self.key, max_retries=0)


@contextlib.contextmanager
def office(folder: Path, *, keys: tuple[str, ...] = (), is_working: bool = True, **limits: Any) -> Iterator[Office]:
    """A life of a server over a folder; what runs is left at the end as a crash leaves it. is_working: do batches run?"""
    desk = open_desk(folder, **{**LIMITS, **limits})
    assert desk is not None
    with running(desk=desk, api_keys=keys) as server:

        async def start() -> Response:
            desk.batches.start(SelfCaller(server.app))
            return Response()

        async def stop() -> Response:
            await desk.close()
            return Response()

        # On the server's own loop.
        server.app.add_api_route("/test/start", start)
        server.app.add_api_route("/test/stop", stop)
        headers = {"x-api-key": keys[0]} if keys else {}
        if is_working:
            assert httpx.get(f"{server.url}/test/start", headers=headers).status_code == 200
        yield Office(server, desk, keys[0] if keys else "none")
        assert httpx.get(f"{server.url}/test/stop", headers=headers).status_code == 200


def line(custom_id: str, content: str = "hi", url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    if url == "/v1/chat/completions":
        body = {"messages": [{"role": "user", "content": content}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": MODEL, **body}}


def jsonl(*lines: object) -> bytes:
    return b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in lines)

"""Chat over HTTP with the real openai client: shapes, order, equality of streamed and whole, stop strings, logprobs, errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.api import sse
from service.errors import OverloadedError
from tests.api.fakes import EOS, MODEL, OTHER_STOP, TEXT, Running, Script

HI: list[Any] = [{"role": "user", "content": "hi"}]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The parsed events; the stream must be well formed and end with [DONE]."""
    blocks = response.text.split("\n\n")
    assert blocks[-1] == ""
    assert blocks[-2] == "data: [DONE]"
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks[:-1])
    return [json.loads(block[6:]) for block in blocks[:-2]]


def content(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"] if c["index"] == index)


def test_whole_answer(client: openai.OpenAI, server: Running) -> None:
    server.engine.script = Script(cached_tokens=3)
    answer = client.chat.completions.create(model=MODEL, messages=HI)
    assert answer.choices[0].message.content == TEXT
    assert (answer.choices[0].finish_reason, answer.object, answer.model) == ("stop", "chat.completion", MODEL)
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    num_tokens = len(TEXT.encode())
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len("user:hi\n"), num_tokens)
    assert answer.usage.total_tokens == len("user:hi\n") + num_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0
    timings = answer.model_extra and answer.model_extra["timings"]
    assert (timings["queue_ms"], timings["prefill_ms"], timings["decode_ms"]) == (1.0, 20.0, 300.0)
    assert answer._request_id


def test_streamed_in_the_order_that_clients_need(server: Running) -> None:
    chunks = events(server.chat(stream=True, n=3))
    assert [c["choices"][0]["index"] for c in chunks[:3]] == [0, 1, 2]
    assert all(c["choices"][0]["delta"] == {"role": "assistant", "content": ""} for c in chunks[:3])
    assert not any("role" in c["choices"][0]["delta"] for c in chunks[3:])
    assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks}) == 1
    for index in range(3):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert content(chunks, index) == TEXT
        assert own[-1]["delta"] == {}
        assert own[-1]["finish_reason"] == "stop"
        assert all(c["finish_reason"] is None for c in own[:-1])
    assert all("usage" not in c and c["choices"] and "error" not in c for c in chunks)
    assert [("timings" in c) for c in chunks] == [False] * (len(chunks) - 1) + [True]


def test_usage_only_when_asked_for(server: Running) -> None:
    whole = server.chat().json()["usage"]
    chunks = events(server.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole
    assert all(c["usage"] is None and c["choices"] for c in chunks[:-1])
    running = events(server.chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}))
    counts = [c["usage"]["completion_tokens"] for c in running]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, whole["completion_tokens"])


def test_openai_accumulates_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=HI, n=2) as stream:
        completion = stream.get_final_completion()
    assert [choice.message.content for choice in completion.choices] == [TEXT, TEXT]
    assert completion.choices[0].message.role == "assistant"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(alphabet="ab🙂é\n ", max_size=30), per_event=st.integers(1, 7), stops=st.lists(st.text("ab🙂 ", min_size=1, max_size=3))
)
def test_streamed_equals_whole(server: Running, text: str, per_event: int, stops: list[str]) -> None:
    server.engine.script = Script(text=text, per_event=per_event)
    whole = server.chat(stop=stops).json()
    chunks = events(server.chat(stop=stops, stream=True, stream_options={"include_usage": True}))
    message = whole["choices"][0]
    assert content(chunks) == message["message"]["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == message["finish_reason"]
    assert chunks[-2]["choices"][0].get("stop_reason") == message.get("stop_reason")
    assert chunks[-1]["usage"] == whole["usage"]


def test_stop_string_ends_the_choice_in_the_engine(server: Running) -> None:
    server.engine.script = Script(waits=0.001)
    body = server.chat(stop=["Stop", "never"], n=2).json()
    first = body["choices"][0]
    assert first["message"]["content"] == TEXT[: TEXT.index("Stop")]
    assert (first["finish_reason"], first["stop_reason"]) == ("stop", "Stop")
    assert body["usage"]["completion_tokens"] == 2 * len(TEXT[: TEXT.index("Stop")].encode() + b"Stop")
    assert sorted(abort[1:] for abort in server.engine.aborts) == [(0, True), (1, True)]
    assert [event.finish for event in server.engine.ended] == ["stop", "stop"]
    kept = server.chat(stop="Stop", include_stop_str_in_output=True).json()["choices"][0]["message"]["content"]
    assert kept == TEXT[: TEXT.index("Stop")] + "Stop"


def test_stop_ids_and_length(server: Running) -> None:
    server.engine.script = Script(stop_id=OTHER_STOP)
    choice = server.chat(stop_token_ids=[OTHER_STOP]).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", OTHER_STOP)
    assert server.engine.requests[-1].sampling.stop_ids == (EOS, OTHER_STOP)
    server.chat(stop_token_ids=[OTHER_STOP], ignore_eos=True)
    assert server.engine.requests[-1].sampling.stop_ids == (OTHER_STOP,)
    for field in ("max_tokens", "max_completion_tokens"):
        choice = server.chat(**{field: 5}).json()["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "Grü�")


def test_sampling_reaches_the_engine(server: Running) -> None:
    server.chat()
    plain = server.engine.requests[-1]
    assert (plain.sampling.temperature, plain.sampling.top_k) == (0.6, 40), "the model's own defaults"
    assert plain.sampling.max_tokens == 2048 - len(plain.prompt)
    server.chat(temperature=0, top_k=-1, top_p=0.5, min_p=0.1, presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5, seed=-7)
    sampling = server.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.0, 0, 0.5, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty, sampling.seed) == (1, -1, 1.5, -7)
    server.chat(logit_bias={"65": 5, "66": -100}, min_tokens=2, max_tokens=9, priority=-3, timeout=2.5, n=2, user="me")
    request = server.engine.requests[-1]
    assert request.sampling.logit_bias == ((65, 5.0), (66, -100.0))
    assert (request.sampling.min_tokens, request.priority, request.timeout_s, request.num_choices) == (2, -3, 2.5, 2)
    seeds = {request.sampling.seed for request in server.engine.requests[:1]} | {request.sampling.seed}
    assert len(seeds) == 2, "without a seed each request draws its own"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(server: Running, stream: bool) -> None:
    server.engine.script = Script(text="aé🙂")
    more = {"logprobs": True, "top_logprobs": 2}
    if stream:
        chunks = events(server.chat(stream=True, **more))
        with_text = [c["choices"][0] for c in chunks if c["choices"][0]["logprobs"]]
        assert [c["delta"]["content"] for c in with_text] == ["a", "é", "🙂"]
        assert [len(c["logprobs"]["content"]) for c in with_text] == [1, 2, 4], "held back until the character is whole"
        entries = [entry for c in with_text for entry in c["logprobs"]["content"]]
    else:
        entries = server.chat(**more).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "aé🙂"
    assert entries[0] == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [
            {"token": "a", "logprob": -0.5, "bytes": [97]},
            {"token": "<|end|>", "logprob": -9999.0, "bytes": list(b"<|end|>")},
        ],
    }
    assert server.chat(logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_unknown_fields_are_reported_wherever_they_stand(server: Running) -> None:
    part = {"type": "text", "text": "hi", "colour": 1, "cache_control": {"type": "ephemeral"}}
    tool = {"type": "function", "function": {"name": "f", "shape": 1}, "cache_control": {"type": "ephemeral"}}
    answer = server.post("/v1/chat/completions", messages=[{"role": "user", "content": [part]}], tools=[tool], tool_choice="none")
    assert answer.json()["warnings"] == [
        "unknown field 'messages[0].content[0].colour' was ignored",
        "unknown field 'tools[0].function.shape' was ignored",
    ]


def test_unknown_fields_are_reported(server: Running) -> None:
    body = {"messages": [{"role": "user", "content": "a", "colour": 1}], "foo\nbar": 1, "store": False, "user": None}
    whole = server.post("/v1/chat/completions", **body)
    expected = ["unknown field 'foo?bar' was ignored", "unknown field 'messages[0].colour' was ignored"]
    assert whole.json()["warnings"] == expected
    assert whole.headers["x-braid-warnings"] == "; ".join(expected)
    chunks = events(server.post("/v1/chat/completions", **body, stream=True))
    assert [c.get("warnings") for c in chunks] == [expected] + [None] * (len(chunks) - 1)
    assert "warnings" not in server.chat().json()
    many = server.chat(**{f"x{i}": 1 for i in range(500)})
    assert len(many.json()["warnings"]) == 16
    assert len(many.headers["x-braid-warnings"]) <= 1024


@pytest.mark.parametrize(
    ("status", "kind"), [(500, openai.InternalServerError), (400, openai.BadRequestError), (408, openai.APIStatusError)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_anything_was_sent_is_a_status(
    client: openai.OpenAI, server: Running, status: int, kind: type[openai.APIStatusError], stream: bool
) -> None:
    server.engine.script = Script(error_after=0, error_status=status)
    with pytest.raises(kind) as caught:
        client.chat.completions.create(model=MODEL, messages=HI, stream=stream)
    assert caught.value.status_code == status
    if status >= 408:
        assert caught.value.response.headers["x-should-retry"] == "false"


def test_a_failure_in_a_stream_is_an_event(client: openai.OpenAI, server: Running) -> None:
    server.engine.script = Script(error_after=4)
    texts: list[str] = []
    with pytest.raises(openai.APIError, match="it broke"):
        texts.extend(c.choices[0].delta.content or "" for c in client.chat.completions.create(model=MODEL, messages=HI, stream=True, n=2))
    assert "".join(texts).startswith("GGrr")
    raw = server.chat(stream=True).text.rstrip("\n").split("\n\n")
    assert json.loads(raw[-1][6:]) == {"error": {"message": "it broke", "type": "server_error", "param": None, "code": None}}


def test_a_fault_of_ours_in_a_stream_is_an_event(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tokens: object, token: int, **others: object) -> bytes:
        if token == ord("w"):
            raise KeyError("/usr/lib/secret")
        return bytes([token])

    monkeypatch.setattr(type(server.codec.tokenizer), "token_bytes", fail)
    streamed = server.chat(stream=True)
    assert streamed.status_code == 200
    assert '{"error":{"message":"The server had an error' in streamed.text
    whole = server.chat()
    assert (whole.status_code, whole.json()["error"]["type"]) == (500, "server_error")
    assert "x-request-id" in whole.headers
    assert "secret" not in streamed.text + whole.text


def test_overload_and_template_errors(server: Running) -> None:
    server.engine.refusal = OverloadedError("9 requests are in flight, which is the limit.", retry_after_s=3.2)
    refused = server.chat()
    assert (refused.status_code, refused.headers["retry-after"], refused.headers["x-should-retry"]) == (429, "4", "true")
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    server.engine.refusal = None
    assert server.chat("refuse me").json()["error"]["message"] == "the template refuses"


def test_long_prompts_are_encoded_beside_the_loop(server: Running) -> None:
    server.chat("x" * 100)
    assert not server.codec.encode_thread.startswith("encode")
    assert server.chat("x" * 10_000).status_code == 400
    assert server.codec.encode_thread.startswith("encode")
    server.codec.encode_thread = ""
    refused = server.chat("x" * 100_000).json()["error"]
    assert (refused["code"], server.codec.encode_thread) == ("context_length_exceeded", ""), "too long for any tokens: not encoded at all"
    assert "maximum context length is 2048 tokens" in refused["message"]


def test_silence_is_filled_with_comments(server: Running, monkeypatch: pytest.MonkeyPatch, client: openai.OpenAI) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE_S", 0.05)
    server.engine.script = Script(text="ab", waits=0.2)
    raw = server.chat(stream=True)
    assert raw.text.startswith(": ping\n\n") or raw.text.split("\n\n")[1] == ": ping"
    assert raw.text.count(": ping\n\n") >= 3
    assert "\nid:" not in raw.text
    text = "".join(c.choices[0].delta.content or "" for c in client.chat.completions.create(model=MODEL, messages=HI, stream=True))
    assert text == "ab"


def test_one_delivery_is_one_write(server: Running) -> None:
    """Through the app itself, where every write can be seen."""
    server.engine.script = Script(text="abc")
    sent: list[dict[str, Any]] = []
    body = json.dumps({"messages": HI, "stream": True, "n": 4}).encode()

    async def call() -> None:
        left = asyncio.Event()
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if parts:
                return parts.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        path = "/v1/chat/completions"
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
        await server.app({**scope, "http_version": "1.1", "scheme": "http", "server": ("x", 1), "root_path": ""}, receive, send)

    asyncio.run(call())
    bodies = [message["body"] for message in sent if message["type"] == "http.response.body"]
    assert [one.count(b"data: ") for one in bodies] == [8, 4, 8, 1], "roles with the first text; ends with the last; [DONE]"


def test_many_at_once_with_one_request_id(server: Running) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> tuple[str | None, str]:
        answer = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": f"number {number}"}], extra_headers={"x-request-id": "same"}
        )
        return answer.choices[0].message.content, answer.id

    async def everybody() -> list[tuple[str | None, str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(20)))

    server.engine.choose = lambda request: Script(text=bytes(request.prompt).decode())
    answers = asyncio.run(everybody())
    assert [text for text, _ in answers] == [f"user:number {number}\n" for number in range(20)]
    assert len({each for _, each in answers}) == 20

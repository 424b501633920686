"""Chat beyond tools and forms: continued messages, template variables, what is told of the prompt, accepted fields, bounds, strictness."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest

from service.api.app import Limits
from service.api.body import BodyLimits
from tests.api.fakes import CONTEXT, MODEL, Running, Script, running
from tests.api.test_chat import HI, content, events
from tests.api.test_openapi import check as conforms
from tests.api.test_validation import check

CHAT = "/v1/chat/completions"
OPEN = [*HI, {"role": "assistant", "content": "It is"}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by_prefix", [False, True])
def test_a_message_is_continued(server: Running, stream: bool, by_prefix: bool) -> None:
    server.engine.script = Script(text=" so.")
    messages = [*HI, {**OPEN[-1], "prefix": True}] if by_prefix else OPEN
    fields: dict[str, Any] = {} if by_prefix else {"continue_final_message": True, "add_generation_prompt": False}
    for echo, expected in ((False, " so."), (True, "It is so.")):
        answer = server.post(CHAT, messages=messages, **fields, echo=echo, stream=stream, n=2)
        assert "warnings" not in answer.text
        for index in range(2):
            text = content(events(answer), index) if stream else answer.json()["choices"][index]["message"]["content"]
            assert text == expected
    assert server.engine.requests[-1].prompt == list(b"user:hi\nassistant:It is"), "the message is left open"
    assert (server.codec.asked["continue_final_message"], server.codec.asked["add_generation_prompt"]) == (True, False)


def test_an_answer_that_was_cut_while_it_reasoned_can_be_sent_back(server: Running) -> None:
    for name in ("reasoning_content", "reasoning"):
        messages = [*HI, {"role": "assistant", "content": None, name: "Hm."}, *HI]
        assert server.post(CHAT, messages=messages).status_code == 200
        assert server.codec.asked["messages"][1] == {"role": "assistant", "content": "", "reasoning_content": "Hm."}
    assert check(server.post(CHAT, messages=[*HI, {"role": "assistant"}, *HI]))["param"] == "messages[1].content"


def test_the_template_gets_what_is_for_it(server: Running) -> None:
    server.chat()
    assert (server.codec.asked["template_kwargs"], server.codec.asked["reasoning_effort"]) == ({}, None)
    assert (server.codec.asked["add_generation_prompt"], server.codec.asked["continue_final_message"]) == (True, False)
    server.chat(chat_template_kwargs={"enable_thinking": False, "level": 3, "name": "x", "share": 0.5}, reasoning_effort="low")
    assert server.codec.asked["template_kwargs"] == {"enable_thinking": False, "level": 3, "name": "x", "share": 0.5}
    assert server.codec.asked["reasoning_effort"] == "low"
    server.chat(add_generation_prompt=False)
    assert server.codec.asked["add_generation_prompt"] is False


@pytest.mark.parametrize("stream", [False, True])
def test_ids_are_told(server: Running, stream: bool) -> None:
    server.engine.script = Script(text="é🙂x stop", per_event=3)
    answer = server.chat(return_token_ids=True, stop="stop", n=2, stream=stream)
    prompt = list(b"user:hi\n")
    if stream:
        chunks = events(answer)
        assert [chunk.get("prompt_token_ids") for chunk in chunks] == [prompt] + [None] * (len(chunks) - 1)
        found = [
            [token for chunk in chunks for choice in chunk["choices"] if choice["index"] == index for token in choice.get("token_ids", [])]
            for index in range(2)
        ]
        for chunk in chunks:
            conforms(chunk, "ChatCompletionChunk")
    else:
        assert answer.json()["prompt_token_ids"] == prompt
        found = [choice["token_ids"] for choice in answer.json()["choices"]]
        conforms(answer.json(), "ChatCompletion")
    assert found == [list("é🙂x stop".encode())] * 2, "up to the one that completed the stop string"


def test_logprobs_of_the_prompt(server: Running) -> None:
    body = server.chat(prompt_logprobs=2, n=2).json()
    conforms(body, "ChatCompletion")
    found = body["prompt_logprobs"]
    assert len(found) == body["usage"]["prompt_tokens"] == len("user:hi\n")
    assert found[0] is None
    assert found[2] == {
        str(ord("e")): {"logprob": -0.5, "rank": 1, "decoded_token": "e"},
        "256": {"logprob": -2.0, "rank": 2, "decoded_token": "<|end|>"},
    }
    read = server.engine.requests[-1].read
    assert read is not None
    assert (read.first, read.num_top, read.pool) == (1, 2, "")
    assert "prompt_logprobs" not in server.chat().json()


@pytest.mark.parametrize("stream", [False, True])
def test_fields_that_answer(server: Running, stream: bool) -> None:
    """The tier that was used, and the fate of a prediction, only where they were asked about."""
    more = {"service_tier": "auto", "prediction": {"type": "content", "content": [{"type": "text", "text": "a"}]}}
    options = {"include_usage": True} if stream else None
    for fields in (more, {}):
        answer = server.chat(**fields, stream=stream, stream_options=options)
        bodies = events(answer) if stream else [answer.json()]
        assert all(body.get("service_tier") == ("default" if fields else None) for body in bodies)
        details = bodies[-1]["usage"]["completion_tokens_details"]
        predicted = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0} if fields else {}
        assert details == {"reasoning_tokens": 0, **predicted}
        for body in bodies:
            conforms(body, "ChatCompletionChunk" if stream else "ChatCompletion")


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("continue_final_message", {"continue_final_message": True}),
        ("continue_final_message", {"messages": OPEN, "continue_final_message": True, "add_generation_prompt": True}),
        ("continue_final_message", {"messages": [{"role": "assistant", "refusal": "no"}], "continue_final_message": True}),
        ("messages[0].prefix", {"messages": [{"role": "user", "content": "a", "prefix": True}]}),
        ("messages[0].prefix", {"messages": [{"role": "assistant", "content": "a", "prefix": True}, *HI]}),
        ("chat_template_kwargs.a", {"chat_template_kwargs": {"a": [1]}}),
        ("chat_template_kwargs.a", {"chat_template_kwargs": {"a": {"b": 1}}}),
        ("chat_template_kwargs", {"chat_template_kwargs": {str(key): [] for key in range(17)}}),
        ("chat_template_kwargs", {"chat_template_kwargs": "x"}),
        ("reasoning_effort", {"reasoning_effort": "enormous"}),
        ("verbosity", {"verbosity": 5}),
        ("service_tier", {"service_tier": "gold"}),
        ("prediction.type", {"prediction": {"type": "thought", "content": "a"}}),
        ("prediction.content", {"prediction": {"type": "content"}}),
        ("prediction.content", {"prediction": {"type": "content", "content": 5}}),
        ("prompt_cache_retention", {"prompt_cache_retention": "1h"}),
        ("prompt_logprobs", {"prompt_logprobs": 1, "stream": True}),
        ("best_of", {"best_of": 2, "stream": True}),
        ("return_token_ids", {"return_token_ids": 1}),
        ("web_search_options", {"web_search_options": {}}),
    ],
)
def test_what_can_not_be_is_named(server: Running, param: str, fields: dict[str, Any]) -> None:
    error = check(server.post(CHAT, **{"messages": HI, **fields}))
    assert error["param"] == param
    assert server.engine.requests == []


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "file", "file": {"file_id": "file-1"}},
        {"type": "video_url", "video_url": {"url": "https://example.com/a.mp4"}},
    ],
)
def test_parts_that_the_model_can_not_read_are_named(server: Running, part: dict[str, Any]) -> None:
    messages = [*HI, {"role": "user", "content": [{"type": "text", "text": "look"}, part]}]
    error = check(server.post(CHAT, messages=messages))
    assert error["param"] == "messages[1].content[1]"
    assert "a part must have type text" in error["message"]
    assert server.engine.requests == []


def test_very_many_parts_cost_nothing(server: Running) -> None:
    parts = [{"type": "text", "text": ""}] * 1000
    messages = [{"role": "user", "content": parts}] * 100
    start = time.monotonic()
    error = check(server.post(CHAT, messages=messages))
    assert error["param"] == "messages"
    assert "at most 16384 content parts together, not 100000" in error["message"]
    assert time.monotonic() - start < 2
    assert server.post(CHAT, messages=[{"role": "user", "content": parts}]).status_code == 200


def test_long_schemas_are_looked_at_beside_the_loop(server: Running) -> None:
    properties = {f"p{number}": {"type": "string", "description": "x" * 50} for number in range(300)}
    answer = server.chat(response_format={"type": "json_schema", "schema": {"type": "object", "properties": properties}})
    assert answer.status_code == 200, answer.text
    assert server.codec.encode_thread.startswith("encode")


def test_what_has_no_effect_is_told_or_refused(server: Running) -> None:
    body = server.chat(verbosity="low", store=True).json()
    assert body["warnings"] == ["verbosity has no effect on this model", "store has no effect: chat completions are not kept"]
    body = server.chat(reasoning_effort="high", chat_template_kwargs={"enable_thinking": True}).json()
    assert body["warnings"] == [
        f"{name} has no effect on this model" for name in ("reasoning_effort", "chat_template_kwargs.enable_thinking")
    ]
    assert "warnings" not in server.chat(reasoning_effort="none", verbosity="medium", store=False, metadata={"a": "b"}, user="me").json()
    with running(limits=Limits(BodyLimits(is_strict=True))) as strict:
        refused = {"verbosity": "low", "store": True, "colour": 1, "reasoning_effort": "low"}
        for param, value in refused.items():
            assert check(strict.chat(**{param: value}))["param"] == param
        assert strict.engine.requests == []
        assert strict.chat(verbosity="medium", store=False).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_moderation_and_the_modes_of_the_cache_are_taken_alike(server: Running, path: str) -> None:
    told = {"messages": HI} if "chat" in path else {"input": "hi"}
    answer = server.post(path, **told, moderation={"model": "omni"}, prompt_cache_options={"mode": "auto"})
    assert (answer.status_code, answer.json()["warnings"]) == (200, ["moderation has no effect: no model here judges texts"])


def test_models_that_make_no_text(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    import msgspec

    vectors = msgspec.structs.replace(server.engine.infos[MODEL], can_generate=False)
    monkeypatch.setitem(server.engine.infos, MODEL, vectors)
    for answer in (server.chat(model=MODEL), server.chat(), server.post("/v1/completions", prompt="a")):
        error = check(answer)
        assert (error["param"], error["code"]) == ("model", "unsupported_model")


def test_all_choices_share_one_prompt(server: Running) -> None:
    body = server.chat(n=5).json()
    assert [request.num_choices for request in server.engine.requests] == [5], "one request of five choices"
    assert body["usage"]["prompt_tokens"] == len("user:hi\n")


def test_openai_sends_everything(client: openai.OpenAI, server: Running) -> None:
    """Every field that the SDK has a name for and that asks for nothing unbuilt."""
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "me"},
        ],
        frequency_penalty=0.1,
        logit_bias={"65": 1},
        logprobs=True,
        max_completion_tokens=20,
        metadata={"a": "b"},
        modalities=["text"],
        n=2,
        parallel_tool_calls=True,
        prediction={"type": "content", "content": "x"},
        presence_penalty=0.1,
        prompt_cache_key="k",
        prompt_cache_retention="24h",
        reasoning_effort="none",
        response_format={"type": "text"},
        safety_identifier="s",
        seed=5,
        service_tier="auto",
        stop=["z"],
        store=False,
        temperature=0.5,
        top_logprobs=2,
        top_p=0.9,
        user="u",
        verbosity="medium",
    )
    assert len(answer.choices) == 2
    assert answer.service_tier == "default"
    assert answer.model_extra is not None
    assert "warnings" not in answer.model_extra
    assert server.engine.requests[-1].sampling.max_tokens == 20 < CONTEXT

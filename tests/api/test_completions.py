"""The older completions route with the real openai client: kinds of prompts, order of choices, logprobs, equality of both modes."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from service.codec.text import StopStrings
from service.errors import OverloadedError
from tests.api.fakes import MODEL, TEXT, VOCAB, Running, Script
from tests.api.test_chat import events


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
def test_kinds_of_prompts(client: openai.OpenAI, server: Running, prompt: Any, ids: list[list[int]]) -> None:
    server.engine.choose = lambda request: Script(text=bytes(request.prompt).decode() + "!")
    answer = client.completions.create(model=MODEL, prompt=prompt, n=2)
    assert [request.prompt for request in server.engine.requests] == ids
    assert [(c.index, c.text) for c in answer.choices] == [
        (2 * i + k, bytes(own).decode() + "!") for i, own in enumerate(ids) for k in (0, 1)
    ]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert answer.usage.completion_tokens == sum(2 * (len(own) + 1) for own in ids)
    texts = [""] * (2 * len(ids))
    for chunk in client.completions.create(model=MODEL, prompt=prompt, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in answer.choices]


def test_sixteen_tokens_unless_told_otherwise(server: Running) -> None:
    server.post("/v1/completions", prompt="a")
    server.post("/v1/completions", prompt="a" * 2040)
    assert [request.sampling.max_tokens for request in server.engine.requests] == [16, 8]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_four_lists(server: Running, stream: bool) -> None:
    server.engine.script = Script(text="aéb")
    answer = server.post("/v1/completions", prompt="x", logprobs=1, stream=stream)
    lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chunk in events(answer) if stream else [answer.json()]:
        for key, values in (chunk["choices"][0]["logprobs"] or {}).items():
            lists[key] += values
    assert lists["tokens"] == ["a", "�", "�", "b"]
    assert lists["token_logprobs"] == [-0.5] * 4
    assert lists["top_logprobs"][0] == {"a": -0.5}
    assert lists["text_offset"][0] == 0
    assert server.post("/v1/completions", prompt="x").json()["choices"][0]["logprobs"] is None


def test_stop_usage_and_warnings(server: Running) -> None:
    whole = server.post("/v1/completions", prompt="x", stop="wör", max_tokens=99, extra=1).json()
    assert whole["choices"][0]["text"] == TEXT[: TEXT.index("wör")]
    assert (whole["choices"][0]["finish_reason"], whole["choices"][0]["stop_reason"]) == ("stop", "wör")
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(server.post("/v1/completions", prompt="x", stop="wör", max_tokens=99, extra=1, stream=True, stream_options=options))
    assert chunks[0]["warnings"] == whole["warnings"] == ["unknown field 'extra' was ignored"]
    assert chunks[-1]["usage"] == whole["usage"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole["choices"][0]["text"]
    assert chunks[-2]["choices"][0]["stop_reason"] == "wör"


def test_bounds_that_need_the_model(server: Running) -> None:
    for body, param in (
        ({"prompt": [0, VOCAB]}, "prompt"),
        ({"prompt": [[0], [VOCAB]]}, "prompt[1]"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"prompt": "a", "stop_token_ids": [VOCAB]}, "stop_token_ids"),
        ({"prompt": "a", "logit_bias": {str(VOCAB): 1}}, "logit_bias"),
    ):
        answer = server.post("/v1/completions", **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert server.post("/v1/completions", prompt=[VOCAB - 1]).status_code == 200
    assert len(server.engine.requests) == 1


def test_a_refusal_half_way_leaves_nothing_running(server: Running) -> None:
    server.engine.script = Script(waits=0.02)
    submit = server.engine.submit

    def refuse_third(request: Any) -> Any:
        if request.request_id.endswith("-2"):
            raise OverloadedError("too much")
        return submit(request)

    server.engine.submit = refuse_third  # type: ignore[method-assign]
    try:
        assert server.post("/v1/completions", prompt=["a", "b", "c"]).status_code == 429
    finally:
        server.engine.submit = submit  # type: ignore[method-assign]
    assert [abort[1:] for abort in server.engine.aborts] == [(None, False)] * 2


def test_one_of_many_prompts_fails(server: Running) -> None:
    server.engine.choose = lambda request: Script(waits=0.005, error_after=3 if request.prompt == [98] else None)
    answer = server.post("/v1/completions", prompt=["a", "b"])
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "it broke")
    assert len(server.engine.aborts) == 1


def test_choices_share_what_is_made_of_their_stop_strings(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StopStrings] = []

    def make(stops: list[str]) -> StopStrings:
        made.append(StopStrings(stops))
        return made[-1]

    monkeypatch.setattr("service.api.backend.StopStrings", make)
    server.engine.script = Script(text="one stop two")
    answer = server.post("/v1/completions", prompt=["a", "b"], n=3, stop=["stop", "top"]).json()
    assert [choice["text"] for choice in answer["choices"]] == ["one "] * 6
    assert len(made) == 1

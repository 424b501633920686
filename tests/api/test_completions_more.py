"""Completions beyond the plain ones: echo with the prompt's logprobs, scoring, fill in the middle, the best of several, ids."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.codec.infill import Infill, infill_of
from service.codec.special import Special, SpecialTokens
from tests.api.fakes import CONTEXT, EOS, MODEL, OTHER_STOP, VOCAB, InfillTokenizer, Running, Script
from tests.api.test_chat import events
from tests.api.test_validation import check

PATH = "/v1/completions"


def joined(answer: Any, index: int = 0) -> dict[str, Any]:
    """One choice of a stream as its whole answer would have it."""
    own = [chunk["choices"][0] for chunk in events(answer) if chunk["choices"] and chunk["choices"][0]["index"] == index]
    whole: dict[str, Any] = {**own[-1], "text": "".join(choice["text"] for choice in own)}
    for choice in own:
        for key, values in (choice["logprobs"] or {}).items():
            whole["logprobs"] = {**(whole["logprobs"] or {}), key: [*(whole["logprobs"] or {}).get(key, []), *values]}
    return whole


@pytest.mark.parametrize("stream", [False, True])
def test_echo_comes_first(server: Running, stream: bool) -> None:
    server.engine.script = Script(text="def")
    for prompt, texts in (("äbc", ["äbcdef"] * 2), ([97, EOS], ["a<|end|>def"] * 2), (["x", "y"], ["xdef"] * 2 + ["ydef"] * 2)):
        answer = server.post(PATH, prompt=prompt, echo=True, n=2, stream=stream)
        found = [joined(answer, index) for index in range(len(texts))] if stream else answer.json()["choices"]
        assert [choice["text"] for choice in found] == texts
    assert server.engine.requests[-1].read is None


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(server: Running, stream: bool) -> None:
    """The prompt's stand before the text's, the first of them unknown, with offsets into the text that is answered."""
    server.engine.script = Script(text="éd", per_event=3)
    answer = server.post(PATH, prompt="aéb", echo=True, logprobs=1, n=2, stream=stream)
    for index in range(2):
        choice = joined(answer, index) if stream else answer.json()["choices"][index]
        lists = choice["logprobs"]
        assert choice["text"] == "aébéd"
        assert lists["tokens"] == ["a", "�", "�", "b", "�", "�", "d"]
        assert lists["token_logprobs"] == [None, -0.25, -0.5, -0.75, -0.5, -0.5, -0.5]
        assert lists["text_offset"] == [0, 1, 2, 2, 3, 4, 4]
        assert lists["top_logprobs"][0] is None
        assert lists["top_logprobs"][3] == {"b": -0.75}
    sent = server.engine.requests[-1].read
    assert sent is not None
    assert (sent.first, sent.num_top) == (1, 1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_without_new_tokens(server: Running, stream: bool) -> None:
    answer = server.post(PATH, prompt=["abc", "d"], echo=True, logprobs=2, max_tokens=0, stream=stream)
    for index, text in enumerate(("abc", "d")):
        choice = joined(answer, index) if stream else answer.json()["choices"][index]
        assert (choice["text"], choice["finish_reason"]) == (text, "length")
        assert choice["logprobs"]["token_logprobs"] == [None, -0.25, -0.5][: len(text)]
    assert [request.sampling.max_tokens for request in server.engine.requests] == [0, 0]
    if not stream:
        assert answer.json()["usage"]["completion_tokens"] == 0
    bare = server.post(PATH, prompt="abc", echo=True, max_tokens=0).json()["choices"][0]
    assert (bare["text"], bare["logprobs"], bare["finish_reason"]) == ("abc", None, "length")
    full = server.post(PATH, prompt=[97] * CONTEXT, echo=True, max_tokens=0, logprobs=0)
    assert len(full.json()["choices"][0]["logprobs"]["tokens"]) == CONTEXT, "the whole context has room for it"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=st.text("ab🙂é", min_size=1, max_size=6),
    text=st.text("cd🙂 ", max_size=12),
    per_event=st.sampled_from([1, 2, 5, 20]),
    stop=st.sampled_from([[], ["c"], ["🙂d", "d "]]),
    more=st.fixed_dictionaries(
        {}, optional={"logprobs": st.integers(0, 2), "return_token_ids": st.just(True), "n": st.just(3), "echo": st.booleans()}
    ),
)
def test_streamed_equals_whole(server: Running, prompt: str, text: str, per_event: int, stop: list[str], more: dict[str, Any]) -> None:
    server.engine.script = Script(text=text, per_event=per_event)
    whole = server.post(PATH, prompt=prompt, stop=stop, **more).json()
    streamed = server.post(PATH, prompt=prompt, stop=stop, stream=True, **more)
    for index, choice in enumerate(whole["choices"]):
        found = joined(streamed, index)
        ids = [
            token
            for chunk in events(streamed)
            for each in chunk["choices"]
            if each["index"] == index
            for token in each.get("token_ids", [])
        ]
        assert (found["text"], found["finish_reason"], found.get("stop_reason")) == (
            choice["text"], choice["finish_reason"], choice.get("stop_reason"),
        )  # fmt: skip
        lists = choice["logprobs"] or {"tokens": []}
        assert found["logprobs"] == (choice["logprobs"] if lists["tokens"] else None)
        assert ids == choice.get("token_ids", [])


def test_logprobs_of_prompts(server: Running) -> None:
    answer = server.post(PATH, prompt=["ab", "c"], prompt_logprobs=1, max_tokens=0).json()
    assert answer["choices"][0]["prompt_logprobs"] == [None, {"98": {"logprob": -0.25, "rank": 1, "decoded_token": "b"}}]
    assert answer["choices"][1]["prompt_logprobs"] == [None]
    assert answer["choices"][0]["text"] == ""
    both = server.post(PATH, prompt="ab", prompt_logprobs=3, echo=True, logprobs=1).json()["choices"][0]
    assert list(both["prompt_logprobs"][1]) == ["98", "256", "255"]
    unranked = server.post(PATH, prompt="ab", prompt_logprobs=0).json()["choices"][0]["prompt_logprobs"][1]
    assert unranked == {"98": {"logprob": -0.25, "rank": None, "decoded_token": "b"}}


def test_ids(server: Running) -> None:
    server.engine.script = Script(text="éx")
    choices = server.post(PATH, prompt=["a", "bc"], return_token_ids=True).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [[97], [98, 99]]
    assert [choice["token_ids"] for choice in choices] == [list("éx".encode())] * 2
    firsts = [chunk["choices"][0] for chunk in events(server.post(PATH, prompt=["a", "bc"], return_token_ids=True, stream=True))[:2]]
    assert [(choice["index"], choice["prompt_token_ids"]) for choice in firsts] == [(0, [97]), (1, [98, 99])]


def test_the_best_of_several(server: Running) -> None:
    """Ranked by the mean log-probability of a token, not by its sum: a long answer is no worse for being long."""
    scripts = [
        Script(text="long and likely", logprob=-0.1),
        Script(text="x", logprob=-0.5),
        Script(text="mid", logprob=-0.3),
        Script(text=""),
    ]
    original = server.engine._event

    def by_choice(request: Any, script: Script, data: bytes, end: str, turn: int, choice: int, done: list[int]) -> Any:
        own = scripts[choice]
        return original(request, own, own.text.encode(), "stop", turn, choice, done)

    server.engine._event = by_choice  # type: ignore[method-assign]
    try:
        body = server.post(PATH, prompt="a", best_of=4, n=3, max_tokens=50).json()
        assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, "long and likely"), (1, "mid"), (2, "x")]
        assert all(choice["logprobs"] is None for choice in body["choices"])
        assert body["usage"]["completion_tokens"] == sum(len(script.text) for script in scripts), "all that was generated is counted"
        assert (server.engine.requests[-1].num_choices, server.engine.requests[-1].sampling.logprobs) == (4, 0)
        chat = server.chat(best_of=2, n=1, logprobs=True).json()["choices"]
        assert [choice["message"]["content"] for choice in chat] == ["long and likely"]
        assert len(chat[0]["logprobs"]["content"]) == len("long and likely")
    finally:
        del server.engine._event  # type: ignore[method-assign]


def test_fill_in_the_middle(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    error = check(server.post(PATH, prompt="def f():", suffix="return 1"))
    assert (error["param"], error["code"]) == ("suffix", "unsupported_parameter")
    monkeypatch.setattr(server.codec, "tokenizer", InfillTokenizer())
    server.engine.script = Script(text="mid")
    answer = server.post(PATH, prompt="a", suffix="b<|fim_middle|>")
    assert answer.json()["choices"][0]["text"] == "mid"
    prefix, suffix, middle = VOCAB, VOCAB + 1, VOCAB + 2
    assert server.engine.requests[-1].prompt == [prefix, 97, suffix, *b"b<|fim_middle|>", middle], "special tokens in the texts are text"
    server.post(PATH, prompt=["a", "b"], suffix="c")
    assert [request.prompt[1] for request in server.engine.requests[-2:]] == [97, 98]
    server.post(PATH, prompt="a", suffix="")
    assert server.engine.requests[-1].prompt == [97], "an empty suffix is none"


def test_marks_of_the_families() -> None:
    def of(*names: str) -> Infill | None:
        tokenizer = InfillTokenizer()
        tokenizer.special = SpecialTokens(Special(1000 + place, name) for place, name in enumerate(names))  # type: ignore[misc]
        return infill_of(tokenizer)  # type: ignore[arg-type]

    assert of("<fim_suffix>", "<fim_prefix>", "<fim_middle>") == Infill(1001, 1000, 1002)
    assert of("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>") == Infill(1000, 1001, 1002)
    assert of("[SUFFIX]", "[PREFIX]") == Infill(1001, 1000, None)
    assert of("<fim_prefix>", "<fim_middle>") is None
    codestral = of("[SUFFIX]", "[PREFIX]")
    assert codestral is not None
    assert codestral.encode(InfillTokenizer(), "a", "b") == [1000, 98, 1001, 97]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("best_of", {"best_of": 1, "n": 2}),
        ("best_of", {"best_of": 2, "stream": True}),
        ("best_of", {"best_of": 129}),
        ("best_of", {"prompt": ["a"] * 2, "best_of": 65}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": -1}),
        ("logprobs", {"logprobs": 21}),
        ("suffix", {"suffix": "a", "prompt": [1, 2]}),
        ("suffix", {"suffix": "a", "echo": True}),
        ("suffix", {"suffix": 5}),
        ("echo", {"echo": 1}),
        ("prompt_logprobs", {"prompt_logprobs": 1, "stream": True}),
        ("prompt_logprobs", {"prompt_logprobs": 21}),
        ("prompt_logprobs", {"prompt_logprobs": -1}),
        ("seed", {"seed": 2**63 - 2, "best_of": 3}),
        ("prompt", {"prompt": "x" * 20_000}),
        ("prompt", {"prompt": [[97] * 3000] * 100}),
    ],
)
def test_what_can_not_be_is_named(server: Running, param: str, fields: dict[str, Any]) -> None:
    assert check(server.post(PATH, **{"prompt": "a", **fields}))["param"] == param
    assert server.engine.requests == []


def test_prompts_that_no_idle_server_could_take(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal to try again later would be tried for ever."""
    monkeypatch.setattr(server.engine, "max_tokens_in_flight", 100)
    error = check(server.post(PATH, prompt=[[97] * 60] * 2))
    assert error["param"] == "prompt"
    assert "120 tokens" in error["message"]
    assert "at most 100" in error["message"]
    assert server.post(PATH, prompt=[[97] * 50] * 2).status_code == 200


def test_special_tokens_are_shown_where_they_are_wanted(server: Running) -> None:
    server.engine.script = Script(text="ab")
    original = server.engine._event

    def with_special(*details: Any) -> Any:
        event = original(*details)
        event.tokens[:] = [OTHER_STOP if token == ord("b") else token for token in event.tokens]
        return event

    server.engine._event = with_special  # type: ignore[method-assign]
    try:
        texts = [server.post(PATH, prompt="x", skip_special_tokens=skip).json()["choices"][0]["text"] for skip in (True, False)]
        chats = [server.chat(skip_special_tokens=skip).json()["choices"][0]["message"]["content"] for skip in (True, False)]
    finally:
        del server.engine._event  # type: ignore[method-assign]
    assert texts == chats == ["a", "a<|other|>"]


def test_openai_reads_what_is_more(client: openai.OpenAI, server: Running) -> None:
    server.engine.script = Script(text="def")
    answer = client.completions.create(model=MODEL, prompt="abc", echo=True, logprobs=2, max_tokens=2, n=2, best_of=3)
    assert [choice.text for choice in answer.choices] == ["abcde"] * 2
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == list("abcde")

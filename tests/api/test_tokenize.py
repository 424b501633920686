"""Prompts as ids and back, in the forms of vLLM and llama-server: the same ids that are sent to the engine, under the same limits."""

from __future__ import annotations

import pytest

from tests.api.fakes import CONTEXT, MODEL, Running
from tests.api.test_openapi import check as check_form
from tests.api.test_validation import HI, check

TEXT = "Grüße"
IDS = list(TEXT.encode())


def test_a_prompt(server: Running) -> None:
    for path in ("/tokenize", "/v1/tokenize"):
        assert server.post(path, model=MODEL, prompt=TEXT).json() == {"count": len(IDS), "max_model_len": CONTEXT, "tokens": IDS}
    told = server.post("/tokenize", prompt="ab", return_token_strs=True).json()
    assert (told["tokens"], told["token_strs"]) == ([97, 98], ["a", "b"])
    check_form(told, "Tokenized")
    check_form(server.post("/tokenize", prompt="ab", with_pieces=True, color=1).json(), "Tokenized")
    check_form(server.post("/detokenize", tokens=[97], color=1).json(), "Detokenized")
    check_form(server.post("/apply-template", messages=HI, color=1).json(), "AppliedTemplate")


def test_llama_servers_form(server: Running) -> None:
    assert server.post("/tokenize", content="ab").json()["tokens"] == [97, 98]
    pieces = server.post("/tokenize", content="aü", with_pieces=True).json()["tokens"]
    # Half a character is bytes, not a replacement.
    assert pieces == [{"id": 97, "piece": "a"}, {"id": 0xC3, "piece": [0xC3]}, {"id": 0xBC, "piece": [0xBC]}]
    assert server.post("/tokenize", content="").json()["tokens"] == []


def test_a_conversation_has_the_ids_that_are_sent(server: Running) -> None:
    told = server.post("/tokenize", messages=HI, add_special_tokens=False).json()
    server.chat(HI[0]["content"])
    assert told["tokens"] == server.engine.requests[-1].prompt
    assert told["count"] == len(told["tokens"])
    assert "warnings" not in told


def test_special_ids_are_added_as_asked(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.codec, "encode_text", lambda text: [1, *text.encode()])
    monkeypatch.setattr(server.codec, "encode_document", lambda text: [2, *text.encode()])
    monkeypatch.setattr(server.codec.tokenizer, "encode", lambda text, allow_special: [3 + allow_special, *text.encode()], raising=False)
    for more, first in (
        ({"prompt": "a"}, 1),
        ({"prompt": "a", "add_special_tokens": False}, 4),
        ({"content": "a"}, 4),
        ({"content": "a", "parse_special": False}, 3),
        ({"content": "a", "add_special": True}, 1),
        ({"content": "a", "add_special": True, "parse_special": False}, 2),
    ):
        assert server.post("/tokenize", **more).json()["tokens"] == [first, 97], more


def test_ids_back_to_text(server: Running) -> None:
    for path in ("/detokenize", "/v1/detokenize"):
        assert server.post(path, tokens=IDS).json() == {"prompt": TEXT, "text": TEXT, "content": TEXT}
    ids = [97, 256, 98]
    assert server.post("/detokenize", tokens=ids).json()["text"] == "a<|end|>b"
    assert server.post("/detokenize", tokens=ids, skip_special_tokens=True).json()["text"] == "ab"
    assert server.post("/detokenize", tokens=[]).json()["text"] == ""


def test_a_template_applied(server: Running) -> None:
    assert server.post("/apply-template", messages=HI).json() == {"prompt": f"user:{HI[0]['content']}\n"}
    whole_request = {"messages": HI, "temperature": 0, "max_tokens": 5, "stream": True}
    assert server.post("/v1/apply-template", **whole_request).json() == {"prompt": f"user:{HI[0]['content']}\n"}
    assert not server.engine.requests


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "b"}, "content"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens"),
        ("/tokenize", {"messages": [{"role": "nobody", "content": "x"}]}, "messages[0].role"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "x" * 100_000}, "prompt"),
        ("/tokenize", {"content": "x" * 100_000}, "content"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, 9999]}, "tokens[1]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/apply-template", {}, "messages"),
    ],
)
def test_bad_input_names_the_field(server: Running, path: str, body: dict[str, object], param: str) -> None:
    assert check(server.post(path, **body), 400)["param"] == param


def test_an_unknown_model(server: Running) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": []}), ("/apply-template", {"messages": HI})):
        assert check(server.post(path, model="nobody", **body), 404)["code"] == "model_not_found"


def test_unknown_fields_are_told(server: Running) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/tokenize", {"messages": HI}), ("/detokenize", {"tokens": []})):
        answer = server.post(path, **body, color=1)
        assert answer.json()["warnings"] == ["unknown field 'color' was ignored"]
        assert "color" in answer.headers["x-braid-warnings"]

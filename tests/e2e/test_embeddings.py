"""The encoder of the catalog beside the default model, in one real server: vectors, rerank, score and classify as a user gets them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoTokenizer, BertModel

from bench.load import serving
from service.catalog import CATALOG, pull
from service.settings import DEFAULT_MODEL

NAME = "all-minilm-l6-v2"
PASSAGE = (Path(__file__).parents[1] / "data" / "passage.txt").read_text(encoding="utf-8")
TEXTS = ["The cat sits outside.", "A dog plays in the garden", "Ünïcode, 量子 & code: f(x) = x+1", "word " * 200, PASSAGE[:600], "?"]

pytestmark = [pytest.mark.e2e, pytest.mark.long]


@pytest.fixture(scope="module")
def folder() -> Path:
    return pull(CATALOG[NAME]).path


@pytest.fixture(scope="module")
def url(folder: Path, smollm2_path: Path) -> Iterator[str]:
    with serving("", [DEFAULT_MODEL, NAME]) as (url, _):
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(url: str, path: str, **body: object) -> dict[str, Any]:
    answer = httpx.post(f"{url}{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_vectors_are_those_of_transformers(client: openai.OpenAI, folder: Path) -> None:
    reference, tokenizer = BertModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = client.embeddings.create(model=NAME, input=TEXTS)
    for text, each in zip(TEXTS, found.data, strict=True):
        ids = tokenizer(text, return_tensors="pt", truncation=False, padding=False)["input_ids"]
        with torch.inference_mode():
            mean = reference(input_ids=ids).last_hidden_state[0].mean(0)
        theirs = (mean / mean.norm()).numpy()
        assert float(theirs @ np.array(each.embedding)) > 0.9999
        np.testing.assert_allclose(each.embedding, theirs, atol=1e-4)


def test_alone_and_in_a_crowd_are_bit_equal(url: str) -> None:
    def vector(answer: dict[str, Any], index: int) -> bytes:
        return base64.b64decode(answer["data"][index]["embedding"])

    crowd = post(url, "/v1/embeddings", model=NAME, input=TEXTS * 20, encoding_format="base64")
    for index, text in enumerate(TEXTS):
        alone = vector(post(url, "/v1/embeddings", model=NAME, input=text, encoding_format="base64"), 0)
        assert {vector(crowd, index + turn * len(TEXTS)) for turn in range(20)} == {alone}


def test_the_encoder_is_the_default_of_what_reads_and_the_decoder_of_what_writes(url: str) -> None:
    assert post(url, "/v1/embeddings", input="a")["model"] == NAME
    assert post(url, "/v1/completions", prompt="a", max_tokens=1)["model"] == DEFAULT_MODEL
    answer = httpx.post(f"{url}/v1/completions", json={"model": NAME, "prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert len(post(url, "/v1/embeddings", model=DEFAULT_MODEL, input="a")["data"][0]["embedding"]) == 576


def test_long_texts(url: str) -> None:
    answer = httpx.post(f"{url}/v1/embeddings", json={"input": "word " * 300})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    cut = post(url, "/v1/embeddings", input="word " * 300, truncate_prompt_tokens=-1)
    fits = post(url, "/v1/embeddings", input="word " * 254)
    assert cut["warnings"] == ["input was cut from 302 to 256 tokens"]
    assert cut["data"] == fits["data"]


def test_rerank_and_score(url: str) -> None:
    documents = ["Berlin is in Germany.", "Paris is the capital of France.", "I like pizza."]
    results = post(url, "/v1/rerank", query="What is the capital of France?", documents=documents)["results"]
    assert [each["index"] for each in results] == [1, 0, 2]
    scores = post(url, "/v1/score", text_1="a cat", text_2=["a kitten", "a car"])["data"]
    assert scores[0]["score"] > 0.6 > scores[1]["score"]


def test_classify(url: str) -> None:
    texts, labels = ["I love this movie, it is great.", "This was a terrible waste of time."], ["positive", "negative"]
    found = post(url, "/v1/classify", model=DEFAULT_MODEL, input=texts, labels=labels)
    assert [each["label"] for each in found["data"]] == labels
    usage = found["usage"]
    # The instruction is computed once for all four answers but for what does not fill a block of 16.
    assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] / 4
    by_cosine = post(url, "/v1/classify", model=NAME, input=["The striker scored twice."], labels=["sports", "finance", "cooking"])
    assert by_cosine["data"][0]["label"] == "sports"
